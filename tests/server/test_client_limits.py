"""As many connections as this process may have files for, and HTTP/1.1 as h11 writes it.

What ends a slow client is in test_attacks_http.py.
"""

import resource
import subprocess
import sys

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixtral_cli.server.client_limits import QuickConnection, connections_allowed


def test_more_files_are_allowed_than_connections():
    allowed = connections_allowed(512)
    assert 1 <= allowed <= 512 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] > allowed


@pytest.mark.parametrize("files", [64, 300])
def test_where_few_files_are_allowed_several_clients_still_are(files):
    code = f"""
import resource
from pixtral_cli.server.client_limits import connections_allowed
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
print(connections_allowed())
"""
    allowed = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert files / 4 <= allowed <= files / 2


@given(
    st.sampled_from(["GET / HTTP/1.1", "HEAD / HTTP/1.1", "GET / HTTP/1.0"]),
    st.sampled_from([[], [("Content-Length", "6")], [("Transfer-Encoding", "chunked")], [("Connection", "close")]]),
    st.lists(st.binary(max_size=300), max_size=5),
)
def test_answers_are_written_as_h11_writes_them(request_line, headers, pieces):
    def written(connection):
        sent = []
        for _ in range(2):  # the second answer of a connection that is kept
            connection.receive_data(f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
            while not isinstance(connection.next_event(), h11.EndOfMessage):
                pass
            body = [b"Hello!"] if ("Content-Length", "6") in headers else pieces
            body = [b""] if request_line.startswith("HEAD") else body
            answer = h11.Response(status_code=200, headers=headers), *(h11.Data(data=data) for data in body)
            sent += [connection.send(event) for event in (*answer, h11.EndOfMessage())]
            if connection.our_state is not h11.DONE:
                break
            connection.start_next_cycle()
        return sent, connection.our_state

    assert written(QuickConnection(h11.SERVER)) == written(h11.Connection(h11.SERVER))


def test_what_comes_after_an_answer_or_before_it_is_refused_as_h11_refuses_it():
    connection = QuickConnection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.next_event(), connection.next_event()
    connection.send(h11.Response(status_code=200, headers=[]))
    connection.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"late"))
