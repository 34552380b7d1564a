"""What a user calls a model on the Hub -> its repository, revision and file. Knows no network."""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote

from . import layout
from .errors import ModelNotFound

PUBLIC_ENDPOINT = "https://huggingface.co"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?"
    r"(:(?P<file>\w[^:\\]*\.gguf|[A-Za-z0-9][\w.-]*))?",
    re.ASCII,
)
ADDRESS = re.compile(r"(https?://)?(?P<host>[^/]+)/(?P<path>.*)", re.IGNORECASE)
FILES = (layout.GGUF, layout.SAFETENSORS)
PAGES = ("tree", "blob", "resolve")
"""What may follow owner/name in an address; a revision comes next, and then perhaps a path."""

NO_PAGE = "Give owner/name as its page on the Hub says it, or the path of what was downloaded."


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of the Hub at a revision, and perhaps a GGUF in it: `owner/name@revision:file.gguf`.

    `file` may be the GGUF's quantisation alone, such as Q8_0.
    """

    name: str
    revision: str = "main"
    file: str | None = None

    @property
    def page(self) -> str:
        """The repository's page on the Hub."""
        return f"{endpoint()}/{self.name}"

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.name + revision + (f":{self.file}" if self.file else "")


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT).rstrip("/")


def parse(name: str) -> Repo:
    """`owner/name[@revision][:file.gguf or quantisation]`, or the address of such a page on the Hub.

    Raises ModelNotFound for what looks like a path, or like no name.

    >>> parse("https://huggingface.co/owner/name/blob/main/model-Q8_0.gguf")
    Repo(name='owner/name', revision='main', file='model-Q8_0.gguf')
    """
    path = _path_on_the_hub(name)
    if path is not None and not NAME.fullmatch(path):
        return _from_page(name, path)
    match = NAME.fullmatch(name if path is None else path)
    if match and ".." not in name and not match["repo"].endswith(FILES):
        return Repo(match["repo"], match["revision"] or "main", match["file"])
    if re.match(r"[a-z][a-z0-9+.-]*://", name, re.IGNORECASE):
        raise ModelNotFound(name, "it is an address, and no page of a model on the Hub", NO_PAGE)
    if name.startswith(("/", ".", "~")) or name.endswith(FILES) or name.count("/") > 1 or "\\" in name:
        raise ModelNotFound(name, "no such file or folder", "Check the path, or give a Hub name such as owner/name.")
    advice = "Give a folder that exists, or a name such as mistral-community/pixtral-12b."
    raise ModelNotFound(name, "it is no folder here, and no Hub name, which is owner/name", advice)


def _path_on_the_hub(name: str) -> str | None:
    """What follows the Hub's address in `name`, a scheme before it or not; None where it is none of the Hub's."""
    own = f"{endpoint()}/"
    address = ADDRESS.fullmatch(name)
    if name.startswith(own):
        path = name.removeprefix(own)
    elif address and address["host"].lower() in HOSTS:
        path = address["path"]
    else:
        return None
    return re.split("[?#]", path)[0].strip("/")


def _from_page(name: str, path: str) -> Repo:
    """The repository whose page, or page of a file, lies at `path` on the Hub."""
    owner, repo, page, revision, *inside = [unquote(word) for word in path.split("/")] + [""] * 4
    if revision == "refs" and len(inside) > 2:  # refs/pr/1, its slashes not escaped
        revision, inside = "/".join([revision, *inside[:2]]), inside[2:]
    file = "/".join(word for word in inside if word)
    wanted = f":{file}" if file.endswith(layout.GGUF) else ""
    match = NAME.fullmatch(f"{owner}/{repo}@{revision}{wanted}")
    if page not in PAGES or not match or ".." in path:
        raise ModelNotFound(name, "it is no page of a model on the Hub", NO_PAGE)
    if page == "tree" and file:
        raise ModelNotFound(name, f"it is the page of a folder, {file}, in a repository", NO_PAGE)
    return Repo(match["repo"], match["revision"], match["file"])
