-- Run once, when docker-compose.yml makes the database: the command service's role owns it, and is no superuser.
\getenv password WATERSHED_PASSWORD
create role watershed login createdb password :'password';
create database watershed owner watershed;
