import socket

from workbench.common.ports import HOST, busy


def test_a_port_is_busy_while_something_listens_and_the_line_says_what_to_do():
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        port = server.getsockname()[1]
        assert busy(port, "for another: make ui PORT=5001") == (
            f"Error: port {port} of 127.0.0.1 cannot be used (Address already in use); for another: make ui PORT=5001"
        )
    assert busy(port, "") is None
