#!/bin/sh
# Looks at the passwords before any server starts, and fails with a sentence about each that cannot work: the server
# would crash, again and again. Invariant: no password is shown. Other scripts read this one, for `value`.

# The value of a variable, or of the file that the variable with _FILE behind its name names.
value() {
  eval "content=\${$1:-} file=\${$1_FILE:-}"
  if [ -n "$file" ]; then
    content=$(cat "$file") || return
  fi
  printf %s "$content"
}

fault() {
  echo "$1: $2" >&2
  faults=1
}

# NATS reads a password as part of its configuration file, where 12e4 is a number and yes is a boolean.
check_nats() {
  case $password in
    [!A-Za-z]*) fault "$name" "a password for NATS must start with a letter: 12e4 would be read as a number." ;;
    *[!A-Za-z0-9_-]*) fault "$name" "a password for NATS must hold only letters, digits, - and _." ;;
    [Tt][Rr][Uu][Ee] | [Ff][Aa][Ll][Ss][Ee] | [Yy][Ee][Ss] | [Nn][Oo] | [Oo][Nn] | [Oo][Ff][Ff])
      fault "$name" "NATS would read this password as a boolean: choose another one." ;;
  esac
}

# From a file, a password may hold anything; from a variable it becomes part of a URL.
check_in_url() {
  case $password in
    *[!A-Za-z0-9._~-]*)
      eval "file=\${${name}_FILE:-}"
      [ -n "$file" ] || fault "$name" "this password must hold only letters, digits, - _ . and ~, or be in a file."
      ;;
  esac
}

check_key() {
  case $password in
    *[!A-Za-z0-9+/=]* | ? | ?? | ??? | ???? | ?????)
      fault "$name" "the key must hold 6 characters or more, only letters, digits and + / =." ;;
  esac
}

check() {
  faults=
  for name in $PASSWORDS; do
    if ! password=$(value "$name"); then
      fault "${name}_FILE" "the file cannot be read: all must be allowed to read it."
    elif [ -z "$password" ]; then
      fault "$name" "the password is empty."
    else
      case $name in
        NATS_*) check_nats ;;
        MONGODB_KEY) check_key ;;
        POSTGRES_PASSWORD | MONGODB_PROJECTION_PASSWORD | MONGODB_QUERY_PASSWORD) check_in_url ;;
      esac
    fi
  done
  [ -z "$faults" ]
}

case $0 in
  *passwords.sh) check ;;
esac
