-- The version of the form in which a state is stored. A state of another form than the program's own is folded anew
-- from the aggregate's events. Rows from before this column, and those that a program without it adds, have form 1.
alter table aggregates add column form smallint not null default 1;
