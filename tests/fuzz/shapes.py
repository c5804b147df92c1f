# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents in the shapes that libvirt knows, beside those of xml/."""

from collections.abc import Sequence

HEAD = "<name>shape</name><uuid>c0ffee00-0000-4000-8000-000000000003</uuid>"
BRIDGE = "<bridge name='virbr9' stp='on' delay='0' macTableManager='libvirt'/>"
IP = (
    "<ip address='192.168.122.1' netmask='255.255.255.0' localPtr='yes'>"
    "<tftp root='/var/lib/tftp'/><dhcp><range start='192.168.122.2' end='192.168.122.254'>"
    "<lease expiry='1' unit='hours'/></range><host mac='00:16:3e:77:e2:ed' name='a' "
    "ip='192.168.122.10'><lease expiry='0'/></host><bootp file='pxelinux.0' server='10.1.2.3'/>"
    "</dhcp></ip>"
)
IP6 = (
    "<ip family='ipv6' address='2001:db8:ca2:2::1' prefix='64'><dhcp>"
    "<range start='2001:db8:ca2:2:1::10' end='2001:db8:ca2:2:1::ff'/>"
    "<host id='0:4:7e:7d:f0:7d:a8:bc:c5:d2:13:32:11:ed:16:ea:84:63' name='p' "
    "ip='2001:db8:ca2:2:3::4'/></dhcp></ip>"
)
DNS = (
    "<dns enable='yes' forwardPlainNames='no'><forwarder addr='8.8.8.8'/>"
    "<forwarder domain='example.com' addr='8.8.4.4'/><forwarder domain='www.example.com'/>"
    "<txt name='example' value='example value'/>"
    "<srv service='name' protocol='tcp' domain='test.com' target='.' port='1024' priority='10'"
    " weight='10'/><host ip='192.168.122.1'><hostname>host</hostname><hostname>gateway</hostname>"
    "</host></dns>"
)
ROUTES = (
    "<route address='192.168.222.0' netmask='255.255.255.0' gateway='192.168.122.10' metric='2'/>"
    "<route family='ipv6' address='2001:db8:ac10:fc00::' prefix='64' "
    "gateway='2001:db8:ca2:2::1234'/>"
    "<route family='ipv6' address='fd00:db8:ac10:fd00::' prefix='64' "
    "gateway='2001:db8:ca2:2::1'/>"
)
OPTIONS = (
    "<dnsmasq:options xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>"
    "<dnsmasq:option value='foo=bar'/><dnsmasq:option value='dhcp-option=6,\"1, 2\"'/>"
    "<dnsmasq:option/></dnsmasq:options>"
)
PLAIN = f"{BRIDGE}<mac address='12:34:56:78:9A:BC'/><mtu size='9000'/>{IP}{IP6}{ROUTES}"

NETWORKS = [
    f"<network>{HEAD}{PLAIN}</network>",
    f"<network ipv6='yes' trustGuestRxFilters='no'>{HEAD}{PLAIN}{DNS}</network>",
    f"<network>{HEAD}<domain name='example.com' localOnly='yes'/>{PLAIN}{OPTIONS}</network>",
    f"<network>{HEAD}<forward dev='eth0' mode='nat'><nat ipv6='yes'><address start='1.2.3.4' "
    f"end='1.2.3.5'/><port start='500' end='1000'/></nat><interface dev='eth0'/></forward>{PLAIN}"
    "</network>",
    f"<network>{HEAD}<forward mode='route'/>{PLAIN}</network>",
    f"<network>{HEAD}<forward mode='open'/>{PLAIN}</network>",
    f"<network>{HEAD}<forward mode='none'/>{PLAIN}</network>",
    f"<network>{HEAD}<forward mode='hostdev' managed='yes'><driver name='vfio'/><address "
    "type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x1'/></forward></network>",
    f"<network>{HEAD}<forward mode='bridge'/><bridge name='ovsbr0'/><virtualport "
    "type='openvswitch'><parameters interfaceid='aa0e9527-d064-479d-1a4c-180860c3e110'/>"
    "</virtualport><portgroup name='bob' default='yes'><vlan trunk='yes'><tag id='666'/>"
    "<tag id='777' nativeMode='tagged'/></vlan><bandwidth><inbound average='1000' peak='5000'/>"
    "</bandwidth></portgroup></network>",
    f"<network>{HEAD}<title>t</title><description>d &amp; e</description><metadata>"
    "<app1:foo xmlns:app1='http://foo.org/'>foo</app1:foo><app2:bar "
    "xmlns:app2='http://bar.com/'><maman:nat xmlns:maman='urn:libvirt-natns:1'/></app2:bar>"
    f"</metadata>{BRIDGE}<port isolated='yes'/>{IP}</network>",
]

DOMAINS = [
    "<domain type='qemu' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    f"{HEAD}<title>t</title><metadata><a:b xmlns:a='urn:x'/><natns:nat "
    "xmlns:natns='urn:libvirt-natns:1'><natns:portForward network='default'><natns:range "
    "start='22'/></natns:portForward></natns:nat></metadata><devices>"
    "<interface type='network'><mac address='52:54:00:e5:48:58'/><source network='default' "
    "portid='f1e6ee55-0000-4000-8000-000000000001' bridge='virbr0'/><target dev='vnet0'/>"
    "<filterref filter='clean-traffic'/><alias name='net0'/></interface>"
    "<interface type='bridge'><mac address='52:54:00:e5:48:59'/><source bridge='br0'/></interface>"
    "<interface type='direct'><source dev='eth0' mode='vepa'/></interface>"
    "<interface type='user'><backend type='passt'/><portForward proto='tcp' "
    "address='2001:db8:ac10:fd01::1:10'><range start='22' to='2022'/></portForward></interface>"
    "</devices><qemu:commandline><qemu:arg value='-x'/></qemu:commandline></domain>",
    f"<domain type='lxc'>{HEAD}<os><type>exe</type><init>/bin/sh</init></os><devices>"
    "<interface type='network'><source network='a'/></interface></devices></domain>",
]


def networks() -> Sequence[bytes]:
    """Networks of all kinds, most of which are none of ours."""
    return [text.encode() for text in NETWORKS]


def domains() -> Sequence[bytes]:
    """Guests with NICs of all kinds."""
    return [text.encode() for text in DOMAINS]
