"""A model's name in, one complete local folder (or GGUF file) out. Knows no tensors' names and no terminal.

`huggingface_hub` does the download (mirrors, tokens, proxies, retries, file locks); it is imported only when the
network is needed. One format is fetched, never two, and never a file that no one here would open.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import cache, checkpoint, layout, weight_files
from .download import Download
from .errors import AdapterOnly, DiskFull, DownloadFailed, Offline
from .hub_errors import translated
from .json_fields import read_json_object
from .layout import Form, Selection
from .progress import Progress
from .repo_name import Repo, parse

TRUE = {"1", "ON", "YES", "TRUE"}

Accepts = Callable[[Mapping[str, Any]], object]
"""Takes a config as Hugging Face writes it, and raises what keeps the model from being run."""


def fetch(
    name: str,
    *,
    weights: bool = True,
    force: bool = False,
    headers: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    form: Form | None = None,
    accepts: Accepts | None = None,
) -> Path:
    """What to open as the model `name`: a local folder, or a GGUF file.

    A path that exists is returned as it is. Otherwise `name` is `owner/name` on the Hub, `owner/name@revision` for
    another branch, tag or commit, `owner/name:file.gguf` for a GGUF in it (or its quantisation, `owner/name:Q8_0`),
    which brings its mmproj file along, or the address of such a page. Of several forms `form` is fetched, or else the
    first of "hf", "native", "gguf". What is cached completely is used without any network call: a newer version on the
    Hub is not looked for, unless `force` fetches everything anew. `weights=False` asks for the small files only. A
    GGUF has none, so all of it is fetched, or with `headers` a file of its length that holds its header only. `tell`
    is called with a sentence when one of several was chosen.

    Raises ModelNotFound, Offline (HF_HUB_OFFLINE), TokenUnusable, Gated, DownloadFailed, DiskFull. For a repository
    that has no weights or no tokenizer that can be read it raises WeightsNotFound, PickleRefused, AdapterOnly, and by
    its config, before anything else is fetched, OtherModel, QuantizedElsewhere or what `accepts` raises.
    """
    if found := _present(name, form, weights=weights, headers=headers, force=force):
        return found
    model = _HubModel(parse(name), form, accepts, weights=weights, force=force, progress=progress, tell=tell)
    return model.fetch(headers=headers)


def fetch_headers(
    name: str,
    folder: Path,
    *,
    form: Form | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    accepts: Accepts | None = None,
) -> Path:
    """What to open to read all headers of the model `name`: itself if it is here, else a skeleton of it in `folder`.

    A skeleton has the small files (which are cached) and, for every weights file, a file as long as the real one that
    holds its header and nothing else; on a disk it takes the header's room. Raises as `fetch`.
    """
    if found := _present(name, form):
        return found
    return _HubModel(parse(name), form, accepts, progress=progress, tell=tell).fetch_headers(folder)


def is_offline() -> bool:
    """Whether the environment forbids the network, by the variables that the Hub's library honours."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in TRUE


def _present(
    name: str, form: Form | None, *, weights: bool = True, headers: bool = False, force: bool = False
) -> Path | None:
    """The path itself, or what is cached completely, unless `force`; without a network, a form that is here rather than
    the preferred one that is not. Raises ModelNotFound for what is no name, and Offline instead of None."""
    path = os.path.expanduser(name)
    if os.path.exists(path):  # unlike Path.exists, False for what can be no path at all
        return Path(path)
    repo = parse(name)
    others = layout.FORMS if form is None and repo.file is None and is_offline() else ()
    for each in () if force else (form, *others):
        if found := cache.find(repo.name, repo.revision, weights=weights, form=each, file=repo.file, headers=headers):
            return found
    if is_offline():
        raise Offline(str(repo), cache.hub_cache_folder(), forced=force)
    return None


class _HubModel:
    """A model in a repository of the Hub: `selection` is what is needed of it. Asks for the listing at once.

    Raises as `layout.select`, and for a repository without a tokenizer that is read here.
    """

    def __init__(
        self,
        repo: Repo,
        form: Form | None,
        accepts: Accepts | None = None,
        *,
        weights: bool = True,
        force: bool = False,
        progress: Progress | None = None,
        tell: Callable[[str], None] | None = None,
    ):
        self.repo, self.accepts, self.weights, self.force = repo, accepts, weights, force
        self.download = Download(repo, progress)
        self.selection = self._select(form)
        if self.selection.note and tell:
            tell(self.selection.note)

    def fetch(self, *, headers: bool) -> Path:
        """The config first, which may end it, and an index, which says how many bytes there are; then the other small
        files, then the weights; then only does the revision point here."""
        download, selection = self.download, self.selection
        download.cached.mark_used(download.commit)
        # Without the listing a GGUF whose mmproj file is to come would look whole.
        download.cached.write_listing(download.commit, download.sizes)
        self._check_config()
        large = self._weight_names() if self.weights or selection.entry else []
        folder = download.folder
        if headers and selection.entry:
            folder = download.cached.headers(download.commit)
            download.get_headers(large, folder)
        else:
            self._get(large)
        with translated(self.repo):
            download.cached.write_ref(self.repo.revision, download.commit)
        return selection.path(folder)

    def fetch_headers(self, folder: Path) -> Path:
        """The small files, and of the weights a skeleton in `folder`."""
        download, selection = self.download, self.selection
        folder = folder / cache.SNAPSHOTS / download.commit
        self._check_config()
        weights = self._weight_names()
        self._get(())
        with translated(self.repo):
            for name in (*selection.side, *([selection.index] if selection.index else [])):
                cache.link(download.folder / name, folder / name)
        download.get_headers(weights, folder)
        return selection.path(folder)

    def _select(self, form: Form | None) -> Selection:
        label, names = self.download.label, self.download.sizes
        try:
            selection = layout.select(label, names, form=form, file=self.repo.file, weights=self.weights)
        except AdapterOnly:
            self.download.get([layout.ADAPTER])
            raise layout.adapter(label, read_json_object(self.download.folder / layout.ADAPTER)) from None
        if selection.form != "gguf" and not names.keys() & set(layout.TOKENIZERS):
            raise layout.no_tokenizer(label, names)
        return selection

    def _weight_names(self) -> list[str]:
        """The weights files to fetch; with an index, which is fetched at once, the shards that it names."""
        download, index = self.download, self.selection.index
        if index and (self.force or not (download.folder / index).is_file()):
            download.get([index], force=self.force)
        names = weight_files.selected(self.selection, download.folder)
        if absent := [name for name in names if name not in download.contents]:
            advice = "Tell the model's owner, or try another revision: owner/name@revision."
            why = "its index" if index else f"{names[0]} is one of {len(names)} files, which"
            raise DownloadFailed(download.label, f"{why} names {absent[0]}, which the repository lacks", advice)
        return names

    def _get(self, weights: Iterable[str]) -> None:
        """Fetch what is not here in full: the small files, and then `weights`. The config is here."""
        names = [name for name in self.selection.side if name != self._config] + [*weights]
        wanted = [name for name in names if self.force or not self.download.has(name)]
        self._check_room(wanted)
        self.download.get(wanted, self.download.progress(wanted), force=self.force)

    @property
    def _config(self) -> str | None:
        """The name of the config; a GGUF has none."""
        rule = layout.FOLDER_FORMS.get(self.selection.form)
        return rule.config if rule else None

    def _check_config(self) -> None:
        """Fetch the config, and raise what it says that keeps the model from being read or run."""
        download, form = self.download, self.selection.form
        if self._config is None:
            return
        if self.force or not download.has(self._config):
            download.get([self._config], force=self.force)
        checkpoint.check_config(
            download.label, download.folder, form, download.sizes, weights=self.weights, accepts=self.accepts
        )

    def _check_room(self, names: Iterable[str]) -> None:
        needed = sum(self.download.remaining(name) for name in names)
        folder = cache.hub_cache_folder()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise DiskFull(self.download.label, existing, needed, free)
