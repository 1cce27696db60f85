#!/bin/bash
# Whether the MongoDB on this port can be written to. It is asked in its own protocol, since mongosh would take a second
# of processor time to start: by one OP_MSG of 52 bytes with {hello: 1, $db: "admin"}, which needs no user.
exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
header='\x34\0\0\0\x01\0\0\0\0\0\0\0\xdd\x07\0\0\0\0\0\0\0'
document='\x1f\0\0\0\x10hello\0\x01\0\0\0\x02$db\0\x06\0\0\0admin\0\0'
printf "$header$document" >&3
# In the reply's BSON, the boolean is a byte behind its name.
dd bs=64k count=1 status=none <&3 | tr '\0' ' ' | LC_ALL=C grep -qa $'isWritablePrimary \x01'
