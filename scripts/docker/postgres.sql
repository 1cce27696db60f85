-- Run once, when docker-compose.yml makes the database: the command service's role owns it, and can do nothing else.
\set password `if [ "$WATERSHED_PASSWORD_FILE" ]; then cat "$WATERSHED_PASSWORD_FILE"; else echo "$WATERSHED_PASSWORD"; fi`
create role watershed login password :'password';
create database watershed owner watershed;
