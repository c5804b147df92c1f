# SPDX-License-Identifier: LGPL-2.1-or-later
"""Firewalls that hosts have: Docker's rules of two versions, ufw, and an administrator's few.

Each rejects the management network 172.30.0.0/24 and leaves the rest to others.
"""

REJECT = "iptables -I FORWARD -d 172.30.0.0/24 -j REJECT"

DOCKER_NAT = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 172.17.0.2:443
COMMIT
"""
DOCKER_20 = f"""{DOCKER_NAT}*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -i docker0 -o docker0 -j ACCEPT
-I FORWARD -i docker0 ! -o docker0 -j ACCEPT
-I FORWARD -o docker0 -j DOCKER
-I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-I FORWARD -j DOCKER-ISOLATION-STAGE-1
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 443 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
DOCKER_28 = f"""{DOCKER_NAT}*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-INTERNAL - [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -j DOCKER-FORWARD
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 443 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-INTERNAL
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
"""
RESTORE = "iptables-restore --noflush <<'END'\n{}END\n"

UFW_IN_A_SANDBOX = "sed -i 's/^IPT_SYSCTL=.*/IPT_SYSCTL=/; s/^IPV6=.*/IPV6=no/' /etc/default/ufw"
"""ufw without the sysctls and the IPv6 that a sandbox lacks."""
UFW = """{sandbox}
sed -i 's/^DEFAULT_FORWARD_POLICY=.*/DEFAULT_FORWARD_POLICY="{policy}"/' /etc/default/ufw
ufw --force enable; ufw route reject to 172.30.0.0/24
"""
"""The program itself, with the rule that stands for all of an administrator's."""

KINDS = {
    "plain": REJECT,
    "drops": f"iptables -P FORWARD DROP; {REJECT}",
    "rejects": f"{REJECT}; iptables -A FORWARD -m comment --comment 'the rest' -j REJECT",
    "docker-20.10": RESTORE.format(DOCKER_20) + REJECT,
    "docker-28": RESTORE.format(DOCKER_28) + REJECT,
    "ufw": UFW.format(policy="DROP", sandbox=UFW_IN_A_SANDBOX),
    "ufw-reject": UFW.format(policy="REJECT", sandbox=UFW_IN_A_SANDBOX),
}
"""What hosts have in their FORWARD chain, as commands."""
