-- The branches of the journal. A journal that was restored to an older copy goes on in a new branch, which shares with its
-- parent all positions up to the one at which it left. The first branch has the journal's identity.
create table journal_branches (
    number integer generated always as identity,
    branch uuid primary key,
    parent uuid references journal_branches,
    -- The last position that it shares with its parent.
    position bigint not null,
    at timestamptz not null default now(),
    actor text,
    reason text not null,
    check (position >= 0 and (parent is not null or position = 0))
);

insert into journal_branches (branch, position, reason)
select journal, 0, 'the beginning'
from journal_head;

-- The branch that the journal goes on in.
alter table journal_head add column branch uuid;
update journal_head set branch = journal;
alter table journal_head
    alter column branch set not null,
    add foreign key (branch) references journal_branches;
