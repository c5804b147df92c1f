# SPDX-License-Identifier: LGPL-2.1-or-later
"""The link between host and router: the addresses and routes of both ends of the patch."""

from dataclasses import dataclass
from socket import AF_INET, AF_INET6

from libvirt_natns import names
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import link_config
from libvirt_natns.upstream.router.link_config import LinkConfig
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

LINK_LOCAL_ROUTER = "fe80::1"
LINK_LOCAL_HOST = "fe80::2"
EVERYTHING = "0.0.0.0/0"
EVERYTHING6 = "::/0"


KEPT_SETTINGS = (("ipv4/conf/accept_local", "1"), ("ipv4/conf/rp_filter", "0"))
"""Settings for packets from addresses of the host that are the router's own, too."""


def _settings(target: Target) -> tuple[tuple[str, str], ...]:
    return (
        ("ipv6/conf/disable_ipv6", "0" if target.addresses6 else "1"),
        # We set link-local addresses ourselves.
        ("ipv6/conf/addr_gen_mode", "1"),
        ("ipv6/conf/accept_ra", "0"),
    )


def router_end(target: Target) -> LinkConfig:
    """Return the router's end of the patch."""
    own = target.addresses6
    return LinkConfig(
        target.namespace,
        names.ROUTER_HOST_LINK,
        (str(target.gateway), *([f"{LINK_LOCAL_ROUTER}/64"] if own else [])),
        tuple((f"{address}/128", LINK_LOCAL_HOST) for address in own),
        (*_settings(target), *(KEPT_SETTINGS if target.addresses4 else ())),
    )


@dataclass(frozen=True, slots=True)
class HostEnd(Operation):
    """The host's end of the patch, with the host's routes through the router.

    On the way back the patch goes, and with it the host's default routes.  So these make
    room before the NIC's own routes come back.
    """

    target: Target
    before: Capture

    def describe(self) -> str:
        return self._config().describe()

    def differs(self, kernel: Kernel) -> list[str]:
        return link_config.differences(self._config())

    def ensure(self, context: ApplyContext) -> None:
        link_config.configure(self._config())

    def take_back(self, kernel: Kernel) -> None:
        kernel.host.links.delete(self.target.link)

    def _config(self) -> LinkConfig:
        target = self.target
        own = target.addresses6
        return LinkConfig(
            None,
            target.link,
            (
                str(target.host),
                *([f"{LINK_LOCAL_HOST}/64"] if own else []),
                *(f"{address}/128" for address in own),
                *(f"{address}/32" for address in target.addresses4),
            ),
            (
                *self._routes(AF_INET, str(target.gateway.ip)),
                *(self._routes(AF_INET6, LINK_LOCAL_ROUTER) if own else ()),
            ),
            _settings(target),
            sources=tuple(self._sources6().items()),
            deprecated=tuple(
                f"{address.ip}/128"
                for address in self.before.ipv6
                if address.ip in own and not address.preferred
            ),
        )

    def _sources6(self) -> dict[str, str]:
        """Return the sources that routes over the NIC named, by the route's destination."""
        own = self.target.addresses6
        routes = [
            route for route in self.before.routes if route.family == AF_INET6 and route.is_way
        ]
        # Of several routes to one destination, that with the least metric counts.
        return {
            route.destination: route.source
            for route in sorted(routes, key=lambda each: -each.metric)
            if route.source and route.source in own
        }

    def _routes(self, family: int, gateway: str) -> list[tuple[str, str]]:
        """Return the host's routes through the router, in place of those over the NIC.

        A default route over another link stays the host's; then only the NIC's other routes
        lead through the router.
        """
        routes = [route for route in self.before.routes if route.family == family]
        if any(route.is_default for route in routes):
            default = EVERYTHING if family == AF_INET else EVERYTHING6
            named = {default, *(self._sources6() if family == AF_INET6 else ())}
            return [(to, gateway) for to in sorted(named)]
        return [(to, gateway) for to in sorted({r.destination for r in routes if r.is_way})]
