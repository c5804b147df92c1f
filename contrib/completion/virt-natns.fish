# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Completion of virt-natns for fish.
#
# contrib/completion/generate.py writes the lines between the marks.

# Print the names of one kind, a line each. libvirt's own command is asked: it
# answers in a tenth of the time that our interpreter needs to start.
# Without "--", a name that begins with "-" would be an option.
function __virt_natns_names
    # begin: names
    set -l names (sh -c '
driver=libvirt/connection-driver/libvirt_driver_lxc.so
ask() {
    timeout 2 virsh -r -q -c "$@"
}
case $1 in
networks) ask qemu:///system net-list --all --name ;;
active) ask qemu:///system net-list --name ;;
guests)
    ask qemu:///system list --all --name
    for file in /usr/lib*/$driver /usr/lib/*/$driver; do
        [ ! -e "$file" ] || ask lxc:///system list --all --name
    done
    ;;
routers)
    sed -n -e "/^ *\\[upstreams\\./{s/^ *\\[upstreams\\.\\([A-Za-z0-9_-]*\\)].*/\\1/;h;}" \\
        -e "/^ *kind *= *.router/{g;p;}" /etc/libvirt-natns/config.toml
    ;;
esac 2>/dev/null | grep .
' sh $argv)
    # end: names
    if contains -- -- (commandline -opc)
        string match -- '*' $names
    else
        string match --invert -- '-*' $names
    end
end

# Print the typed commands, and how many operands follow them.
function __virt_natns_place
    set -l words (commandline -opc)
    set -l path
    set -l count 0
    set -l waiting
    set -l ended
    for word in $words[2..]
        if test -n "$waiting"
            set waiting
            continue
        end
        if test -z "$ended"; and string match --quiet -- '-*' $word
            if test "$word" = --
                set ended yes
            else if contains -- $word $__virt_natns_with_value
                set waiting yes
            end
            continue
        end
        if contains -- (string join ' ' $path $word) $__virt_natns_paths
            set -a path $word
        else
            set count (math $count + 1)
        end
    end
    printf '%s|%s\n' (string join ' ' $path) $count
end

# True if these commands were typed, and an option may follow.
function __virt_natns_in
    string match --quiet -- "$argv|*" (__virt_natns_place)
    and not contains -- -- (commandline -opc)
end

# True if these commands were typed, with that many operands; "*": with any number.
function __virt_natns_at
    string match --quiet -- "$argv[1]|$argv[2]" (__virt_natns_place)
end

# Complete a command and its arguments behind "--".
function __virt_natns_command
    set -l words (commandline -opc)
    if set -l at (contains --index -- -- $words)
        set -l typed $words[(math $at + 1)..]
        complete -C (string join ' ' -- (string escape -- $typed) (commandline -ct))
    else
        echo --
    end
end

complete -c virt-natns -f
# begin: grammar
set -g __virt_natns_with_value --confirm-within --format --guest-address --mac --network --scope --source
set -g __virt_natns_paths 'install' 'uninstall' 'status' 'watch' 'check' 'sync' 'plan' 'validate' 'doctor' 'forward' 'forward list' 'forward add' 'forward remove' 'router' 'router up' 'router confirm' 'router down' 'router status' 'diagram' 'report' 'metrics' 'serve' 'exec'

complete -c virt-natns -n '__virt_natns_at \'\' 0' -a install -d 'install libvirt\'s hooks and handle networks from now on'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a uninstall -d 'remove the hooks and give active networks back to libvirt'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a status -d 'show the networks, their addresses and their health'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a watch -d 'print each change of networks, guests and forwards'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a check -d 'compare the networks with the kernel; exit status 1 if anything differs'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a sync -d 'repair each difference, and change nothing else'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a plan -d 'print the operations for a network, and change nothing'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a validate -d 'check files with networks, domains and configurations, without root; exit status 1 if any is wrong'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a doctor -d 'check that this machine has all that libvirt-natns needs; exit status 1 if anything is broken'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a forward -d 'list, add or remove published ports of guests'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a router -d 'move a host\'s NIC into a router namespace, and back'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a diagram -d 'draw the networks with their guests, forwards and upstreams'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a report -d 'write the facts for a bug report to a file, without secrets'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a metrics -d 'print metrics for Prometheus'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a serve -d 'run the resident service in the foreground, as systemd does'
complete -c virt-natns -n '__virt_natns_at \'\' 0' -a exec -d 'run a command inside a network\'s namespace'
complete -c virt-natns -n '__virt_natns_in \'\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'\'' -l version -d 'show program\'s version number and exit'

complete -c virt-natns -n '__virt_natns_in \'install\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'install\'' -l scope -x -a 'isolated annotated' -d 'handle every isolated network, or only networks with <natns:nat>'
complete -c virt-natns -n '__virt_natns_in \'install\'' -l package -d 'for a package\'s scripts: leave the service to the package manager, and say less'

complete -c virt-natns -n '__virt_natns_in \'uninstall\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'uninstall\'' -l package -d 'for a package\'s scripts: keep the state, and the service\'s units'

complete -c virt-natns -n '__virt_natns_in \'status\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'status\'' -l json -d 'print JSON, for programs'
complete -c virt-natns -n '__virt_natns_in \'status\'' -l watch -d 'show the status anew at each change'
complete -c virt-natns -n '__virt_natns_at \'status\' 0' -a '(__virt_natns_names networks)' -d 'name or uuid of a single network'

complete -c virt-natns -n '__virt_natns_in \'watch\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'watch\'' -l json -d 'print JSON, an object a line'

complete -c virt-natns -n '__virt_natns_in \'check\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'check\'' -l json -d 'print JSON, for programs'
complete -c virt-natns -n '__virt_natns_at \'check\' 0' -a '(__virt_natns_names active)' -d 'name or uuid of a single network'

complete -c virt-natns -n '__virt_natns_in \'sync\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'sync\'' -l dry-run -d 'print the differences, and repair nothing'

complete -c virt-natns -n '__virt_natns_in \'plan\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'plan\'' -l json -d 'print JSON, for programs'
complete -c virt-natns -n '__virt_natns_at \'plan\' 0' -a '(__virt_natns_names networks)' -d 'a file with the XML of a network, or the name of a network'
complete -c virt-natns -n '__virt_natns_at \'plan\' 0' -F -d 'a file with the XML of a network, or the name of a network'

complete -c virt-natns -n '__virt_natns_in \'validate\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_at \'validate\' \'*\'' -F -d 'XML of libvirt, or a config.toml'

complete -c virt-natns -n '__virt_natns_in \'doctor\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'doctor\'' -l json -d 'print JSON, for programs'

complete -c virt-natns -n '__virt_natns_at \'forward\' 0' -a list -d 'show the published ports, chosen ports included'
complete -c virt-natns -n '__virt_natns_at \'forward\' 0' -a add -d 'publish ports of a guest, now and at each later start'
complete -c virt-natns -n '__virt_natns_at \'forward\' 0' -a remove -d 'withdraw ports of a guest, and delete their conntrack entries'
complete -c virt-natns -n '__virt_natns_in \'forward\'' -s h -l help -d 'show this help message and exit'

complete -c virt-natns -n '__virt_natns_in \'forward list\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'forward list\'' -l json -d 'print JSON, for programs'
complete -c virt-natns -n '__virt_natns_at \'forward list\' 0' -a '(__virt_natns_names guests)' -d 'name or uuid of a single guest'

complete -c virt-natns -n '__virt_natns_in \'forward add\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'forward add\'' -l source -x -d 'allowed clients; default: all'
complete -c virt-natns -n '__virt_natns_in \'forward add\'' -l network -x -a '(__virt_natns_names networks)' -d 'the guest\'s NIC in this network'
complete -c virt-natns -n '__virt_natns_in \'forward add\'' -l mac -x -d 'the guest\'s NIC with this MAC address'
complete -c virt-natns -n '__virt_natns_in \'forward add\'' -l guest-address -x -d 'the guest\'s address, if not from DHCP'
complete -c virt-natns -n '__virt_natns_at \'forward add\' 0' -a '(__virt_natns_names guests)' -d 'name or uuid of the guest'

complete -c virt-natns -n '__virt_natns_in \'forward remove\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_at \'forward remove\' 0' -a '(__virt_natns_names guests)' -d 'name or uuid of the guest'

complete -c virt-natns -n '__virt_natns_at \'router\' 0' -a up -d 'move the NIC into its router namespace, or repair the router'
complete -c virt-natns -n '__virt_natns_at \'router\' 0' -a confirm -d 'confirm a router, so that it is not rolled back'
complete -c virt-natns -n '__virt_natns_at \'router\' 0' -a down -d 'give the NIC, all addresses, routes and resolvers back to the host'
complete -c virt-natns -n '__virt_natns_at \'router\' 0' -a status -d 'show the state of the router'
complete -c virt-natns -n '__virt_natns_in \'router\'' -s h -l help -d 'show this help message and exit'

complete -c virt-natns -n '__virt_natns_in \'router up\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'router up\'' -l confirm-within -x -d 'roll the router back unless it is confirmed within this time, such as 60s'
complete -c virt-natns -n '__virt_natns_in \'router up\'' -l boot -d 'do nothing for a router that was never confirmed'
complete -c virt-natns -n '__virt_natns_at \'router up\' 0' -a '(__virt_natns_names routers)' -d 'the upstream of kind router; default: the only router'

complete -c virt-natns -n '__virt_natns_in \'router confirm\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_at \'router confirm\' 0' -a '(__virt_natns_names routers)' -d 'the upstream of kind router; default: the only router'

complete -c virt-natns -n '__virt_natns_in \'router down\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'router down\'' -l force -d 'also while networks use the router'
complete -c virt-natns -n '__virt_natns_at \'router down\' 0' -a '(__virt_natns_names routers)' -d 'the upstream of kind router; default: the only router'

complete -c virt-natns -n '__virt_natns_in \'router status\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'router status\'' -l json -d 'print JSON, for programs'
complete -c virt-natns -n '__virt_natns_at \'router status\' 0' -a '(__virt_natns_names routers)' -d 'a single upstream of kind router'

complete -c virt-natns -n '__virt_natns_in \'diagram\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'diagram\'' -l format -x -a 'text svg dot mermaid' -d 'text for a terminal, svg for a browser, dot for graphviz, mermaid for a page'

complete -c virt-natns -n '__virt_natns_in \'report\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_in \'report\'' -l network -x -a '(__virt_natns_names networks)' -d 'name of the network that the report is about'
complete -c virt-natns -n '__virt_natns_at \'report\' 0' -F -d 'the file to write (default: virt-natns-report-TIME.txt)'

complete -c virt-natns -n '__virt_natns_in \'metrics\'' -s h -l help -d 'show this help message and exit'

complete -c virt-natns -n '__virt_natns_in \'serve\'' -s h -l help -d 'show this help message and exit'

complete -c virt-natns -n '__virt_natns_in \'exec\'' -s h -l help -d 'show this help message and exit'
complete -c virt-natns -n '__virt_natns_at \'exec\' 0' -a '(__virt_natns_names active)' -d 'name or uuid of a network that is up'
complete -c virt-natns -n '__virt_natns_at \'exec\' \'*\'' -a '(__virt_natns_command)' -d 'the command to run'
# end: grammar
