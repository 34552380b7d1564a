"""A model's name in, one complete local folder (or GGUF file) out. Knows no tensors' names and no terminal.

`huggingface_hub` does the download (mirrors, tokens, proxies, retries, file locks); it is imported only when the
network is needed. One format is fetched, never two, and never a file that no one here would open.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import cache, layout, quantization, weight_files
from .download import Download
from .errors import AdapterOnly, DiskFull, DownloadFailed, Offline
from .hub_errors import translated
from .json_fields import read_json_object
from .layout import Form, Selection, select
from .progress import DownloadProgress, Progress
from .repo_name import Repo, parse

TRUE = {"1", "ON", "YES", "TRUE"}


def fetch(
    name: str,
    *,
    weights: bool = True,
    force: bool = False,
    headers: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    form: Form | None = None,
) -> Path:
    """What to open as the model `name`: a local folder, or a GGUF file.

    A path that exists is returned as it is. Otherwise `name` is `owner/name` on the Hub, `owner/name@revision` for
    another branch, tag or commit, `owner/name:file.gguf` for a GGUF in it (or its quantisation, `owner/name:Q8_0`),
    which brings its picture part along, or the address of such a page. Of several forms `form` is fetched, or else the
    first of "hf", "native", "gguf". What is cached completely is used without any network call: a newer version on the
    Hub is not looked for, unless `force` fetches everything anew. `weights=False` asks for the small files only. A
    GGUF has none, so all of it is fetched, or with `headers` a file of its length that holds its header only. `tell`
    is called with a sentence when one of several was chosen.

    Raises ModelNotFound, Offline (HF_HUB_OFFLINE), TokenUnusable, Gated, DownloadFailed, DiskFull, and, before anything
    large is fetched, WeightsNotFound, PickleRefused, AdapterOnly or QuantizedElsewhere for a repository that has no
    weights or no tokenizer that can be read.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):  # unlike Path.exists, False for what can be no path at all
        return Path(path)
    repo = parse(name)
    if not force and (found := _cached(repo, weights, form, headers)):
        return found
    if is_offline():
        raise Offline(str(repo), cache.hub_cache_folder(), forced=force)
    return _download(repo, weights, force, form, headers, progress=progress, tell=tell)


def fetch_headers(
    name: str,
    folder: Path,
    *,
    form: Form | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """What to open to read all headers of the model `name`: itself if it is here, else a skeleton of it in `folder`.

    A skeleton has the small files (which are cached) and, for every weights file, a file as long as the real one that
    holds its header and nothing else; on a disk it takes the header's room. Raises as `fetch`.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    repo = parse(name)
    if found := _cached(repo, True, form):
        return found
    if is_offline():
        raise Offline(str(repo), cache.hub_cache_folder())
    download = Download(repo, progress)
    download.listing()
    selection = _select(download, repo, form)
    if selection.note and tell:
        tell(selection.note)
    folder = folder / cache.SNAPSHOTS / download.commit
    weights = _weight_names(download, selection, force=False)
    small = [*selection.side, *([selection.index] if selection.index else [])]
    _get(download, selection, (), force=False)
    _refuse_quantized(download, selection)
    with translated(repo):
        for small_file in small:
            cache.link(download.folder / small_file, folder / small_file)
    download.get_headers(weights, folder)
    return selection.path(folder)


def is_offline() -> bool:
    """Whether the environment forbids the network, by the variables that the Hub's library honours."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in TRUE


def _cached(repo: Repo, weights: bool, form: Form | None, headers: bool = False) -> Path | None:
    """What is here completely; without a network, a form that is here rather than the preferred one that is not."""
    others = layout.FORMS if form is None and repo.file is None and is_offline() else ()
    for each in (form, *others):
        if found := cache.find(repo.name, repo.revision, weights=weights, form=each, file=repo.file, headers=headers):
            return found
    return None


def _download(
    repo: Repo,
    weights: bool,
    force: bool,
    form: Form | None,
    headers: bool,
    *,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> Path:
    """Small files first, the config the last of them, then the weights; then only does the revision point here.

    An index comes before all: it says which weights there are, and so how many bytes.
    """
    download = Download(repo, progress)
    sizes = download.listing()
    selection = _select(download, repo, form, weights=weights)
    if selection.note and tell:
        tell(selection.note)
    download.cached.mark_used(download.commit)
    download.cached.write_listing(download.commit, sizes)  # else a GGUF whose picture part is to come looks whole
    large = _weight_names(download, selection, force) if weights or selection.entry else []
    folder = download.folder
    if headers and selection.entry:
        folder = download.cached.headers(download.commit)
        download.get_headers(large, folder)
    else:
        _get(download, selection, large, force)
    with translated(repo):
        download.cached.write_ref(repo.revision, download.commit)
    return selection.path(folder)


def _select(download: Download, repo: Repo, form: Form | None, weights: bool = True) -> Selection:
    """What of the repository is needed. Raises as `select`, and for one without a tokenizer that is read here."""
    label, names = download.label, download.sizes
    try:
        selection = select(label, names, form=form, file=repo.file, weights=weights)
    except AdapterOnly:
        download.get([layout.ADAPTER])
        folder = download.folder
        raise layout.adapter(label, read_json_object(folder / layout.ADAPTER)) from None
    if selection.form != "gguf" and not names.keys() & set(layout.TOKENIZERS):
        raise layout.no_tokenizer(label, names)
    return selection


def _refuse_quantized(download: Download, selection: Selection) -> None:
    """Raise QuantizedElsewhere by the config, which has arrived, before anything large is asked for."""
    if selection.form == "gguf":
        return
    config = read_json_object(download.folder / layout.FOLDER_FORMS[selection.form].config)
    other = next((form for form in layout.forms(download.sizes) if form != selection.form), None)
    quantization.refuse(download.label, config, download.sizes if selection.form == "hf" else (), other)


def _weight_names(download: Download, selection: Selection, force: bool) -> list[str]:
    """The weights files to fetch; with an index, which is fetched at once, the shards that it names."""
    if selection.index and (force or not (download.folder / selection.index).is_file()):
        download.get([selection.index], force=force)
    names = weight_files.selected(selection, download.folder)
    if absent := [name for name in names if name not in download.sizes]:
        advice = "Tell the model's owner, or try another revision: owner/name@revision."
        why = "its index" if selection.index else f"{names[0]} is one of {len(names)} files, which"
        raise DownloadFailed(download.label, f"{why} names {absent[0]}, which the repository lacks", advice)
    return names


def _get(download: Download, selection: Selection, weights: Iterable[str], force: bool) -> None:
    """Fetches what is not here in full: the small files, and then, if their config lets them be read, the `weights`."""
    small, large = ([name for name in names if force or not download.has(name)] for names in (selection.side, weights))
    _check_room(download, [*small, *large])
    progress = download.progress([*small, *large])
    _get_whole(download, small, progress, force)
    if large:
        _refuse_quantized(download, selection)
        _get_whole(download, large, progress, force)


def _get_whole(download: Download, names: Sequence[str], progress: DownloadProgress, force: bool) -> None:
    folder = download.folder
    download.get(names, progress, force=force)
    for name in names:
        if not cache.is_whole(folder / name):
            raise DownloadFailed(download.label, f"{name} arrived with another length than its header says")


def _check_room(download: Download, names: Iterable[str]) -> None:
    needed = sum(download.remaining(name) for name in names)
    existing = next(p for p in (cache.hub_cache_folder(), *cache.hub_cache_folder().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskFull(download.label, existing, needed, free)
