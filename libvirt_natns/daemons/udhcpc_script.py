# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell scripts around udhcpc: for each event of a client, and for its start.

udhcpc runs a program with the event as its argument.  On Debian, files below /run cannot be
executed (noexec).  So the program is the shell, and the event is the name of a file in the
client's working directory.

A client that starts reports the same event as a client that has lost its lease.  The file
``times`` tells them apart.  The lease of a client that was killed is kept, as the next
client asks for the same address.  If no server answers the next client, the lease still ends
in time: the script checks after each round of questions without an answer.
"""

EVENTS = ("deconfig", "bound", "renew", "leasefail", "nak")
SCRIPT = """\
#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# libvirt-natns: udhcpc runs this in its own directory at each event, with what the
# server said in the environment, and waits for it.  The event is the script's name.
# A renewal that brings nothing new costs one mv.

changed() {
    # Told to the listener, which has what the client and this have not: all capabilities.
    [ -e awaited ] || echo >&9
}

# The lease's client, when it got it, and for how long; 0 without a lease.
holder=0 obtained=0 seconds=0
[ ! -e times ] || read -r holder obtained seconds <times
read -r now _ </proc/uptime
now=${now%.*}

lost() {
    [ -e lease ] || exit 0
    rm -f lease times
    changed
}

case ${0##*/} in
bound | renew)
    new="ip=$ip
mask=$mask
router=$router
dns=$dns
mtu=$mtu
routes=$staticroutes
server=$serverid
"
    old=
    if [ -e lease ]; then
        while IFS= read -r line; do
            old="$old$line
"
        done <lease
    fi
    echo "$PPID $now ${lease:-0}" >times.new && mv -f times.new times
    [ "$new" != "$old" ] || exit 0
    printf %s "$new" >lease.new && mv -f lease.new lease
    changed
    ;;
deconfig)
    # Each client begins with that; only the lease's own has lost it.
    [ "$PPID" != "$holder" ] || lost
    ;;
leasefail)
    # Nobody answers, also where a lease is left of a client that was killed.
    [ "$seconds" -eq 0 ] || [ "$now" -lt $((obtained + seconds)) ] || lost
    ;;
esac
"""
"""Runs at each event of a client.  The text is compared with the file of a running client."""

DETACH = """\
rm -f told
mkfifo told || exit
sh -c 'while read -r _; do sh ./command </dev/null; done' <told >/dev/null 2>&1 &
exec 9>told
rm -f told
"$@" </dev/null >/dev/null 2>&1 &
echo $! >"$0"
"""
"""Starts a client beside a listener, which runs the command when the client's script says so.

The client reads packets of the network, so it lacks the capabilities that the command
needs.  The listener reads only lines of a pipe, and ends with the client, its writer; udhcpc
uses descriptors 3 and 4 itself.  The shell is the parent of both for a moment only.  The
process id is written even if the caller is killed.
"""
