"""Ports of this machine on which the Makefile starts servers."""

import socket

HOST = "127.0.0.1"


def busy(port: int, remedy: str) -> str | None:
    """The line for the person where something listens on a port of this machine already; None where it is free.

    Args:
        remedy: what to do instead.
    """
    with socket.socket() as one:
        # As servers do it: else a port counts as taken for a minute after its last server has gone.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError as error:
            return f"Error: port {port} of {HOST} cannot be used ({error.strerror}); {remedy}"
    return None
