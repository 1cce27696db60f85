#!/bin/sh
# Starts a program for people where the passwords are in files, with the URLs that docker-compose.yml gives it otherwise.
. /watershed/passwords.sh

url() {
  printf 'nats://%s:%s@nats:4222' "$1" "$(value "$2")"
}

NATS_URL=$(url client NATS_CLIENT_PASSWORD)
NATS_OPERATOR_URL=$(url operator NATS_OPERATOR_PASSWORD)
NATS_SYS_URL=$(url sys NATS_SYS_PASSWORD)
NATS_SUBSCRIBER_URL=$(url subscriber NATS_SUBSCRIBER_PASSWORD)
export NATS_URL NATS_OPERATOR_URL NATS_SYS_URL NATS_SUBSCRIBER_URL
exec "$@"
