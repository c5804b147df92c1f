# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps for the host: the addresses and routes of the patch to the router, and resolv.conf."""

from socket import AF_INET, AF_INET6

from libvirt_natns import names
from libvirt_natns.upstream.router import host_resolv_conf, link_config
from libvirt_natns.upstream.router.link_config import LinkConfig
from libvirt_natns.upstream.router.step_context import Step, StepContext
from libvirt_natns.upstream.router.steps_namespace import end_patch

LINK_LOCAL_ROUTER = "fe80::1"
LINK_LOCAL_HOST = "fe80::2"
EVERYTHING = "0.0.0.0/0"
EVERYTHING6 = "::/0"


# -- the patch ---------------------------------------------------------------


def _ends(context: StepContext) -> tuple[LinkConfig, LinkConfig]:
    """Return the router's end of the patch, and the host's."""
    own = context.target.addresses6
    settings = (
        ("ipv6/conf/disable_ipv6", "0" if own else "1"),
        # We set link-local addresses ourselves.
        ("ipv6/conf/addr_gen_mode", "1"),
        ("ipv6/conf/accept_ra", "0"),
    )
    return _router_end(context, settings), _host_end(context, settings)


def _router_end(context: StepContext, settings: tuple[tuple[str, str], ...]) -> LinkConfig:
    target = context.target
    own = target.addresses6
    return LinkConfig(
        target.namespace,
        names.ROUTER_HOST_LINK,
        (str(target.gateway), *([f"{LINK_LOCAL_ROUTER}/64"] if own else [])),
        tuple((f"{address}/128", LINK_LOCAL_HOST) for address in own),
        settings,
    )


def _host_end(context: StepContext, settings: tuple[tuple[str, str], ...]) -> LinkConfig:
    target = context.target
    own = target.addresses6
    return LinkConfig(
        None,
        target.link,
        (
            str(target.host),
            *([f"{LINK_LOCAL_HOST}/64"] if own else []),
            *(f"{address}/128" for address in own),
        ),
        (
            *_ways(context, AF_INET, str(target.gateway.ip)),
            *(_ways(context, AF_INET6, LINK_LOCAL_ROUTER) if own else ()),
        ),
        settings,
    )


def _ways(context: StepContext, family: int, gateway: str) -> list[tuple[str, str]]:
    """Return the host's routes through the router, in place of those over the NIC.

    A default route over another link stays the host's; then only the NIC's other routes
    lead through the router.
    """
    routes = [route for route in context.before.routes if route.family == family]
    if any(route.is_default for route in routes):
        return [(EVERYTHING if family == AF_INET else EVERYTHING6, gateway)]
    return [(to, gateway) for to in sorted({r.destination for r in routes if r.is_way})]


def _patch_differs(context: StepContext) -> list[str]:
    return [line for end in _ends(context) for line in link_config.differences(end)]


def _connect(context: StepContext) -> None:
    for end in _ends(context):
        link_config.ensure(end)


# -- resolv.conf -------------------------------------------------------------


def _resolvers_differ(context: StepContext) -> list[str]:
    servers = context.target.servers
    if not servers:
        return []
    wanted = host_resolv_conf.wanted(servers, context.record.resolver)
    if host_resolv_conf.look() == wanted:
        return []
    return [f"{host_resolv_conf.FILE} does not name {', '.join(servers)}"]


def _set_resolvers(context: StepContext) -> None:
    servers = context.target.servers
    if servers:
        host_resolv_conf.restore(host_resolv_conf.wanted(servers, context.record.resolver))


def _return_resolvers(context: StepContext) -> None:
    host_resolv_conf.restore(context.record.resolver)


STEPS = (
    # On the way back the host's end goes first, and with it the host's default routes.
    Step("connect the host", _patch_differs, _connect, end_patch),
    Step("set the resolvers", _resolvers_differ, _set_resolvers, _return_resolvers),
)
