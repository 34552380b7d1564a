"""As many connections as this process may have files for; what ends a slow client is in test_attacks_http.py."""

import resource
import subprocess
import sys

import pytest

from pixtral_cli.server.client_limits import connections_allowed


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
