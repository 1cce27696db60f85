-- The journal's identity, which every event carries into the stream: what says another is not of this journal.
alter table journal_head add column journal uuid not null default gen_random_uuid();
