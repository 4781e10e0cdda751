"""Parts of a source, consecutive images each, that other processes open again.

Of local and of remote files a listing lies in a folder that all of these processes see, so that each holds the names of
one part at a time. Every other source, such as a table or an array, is opened again as a whole by each process, which
then holds what the source itself holds: a name of every image, and the pixels of an .npz.
"""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from spice_dist.data.dataset import is_ours, open_given
from spice_dist.data.files import publish
from spice_dist.data.lists import SOUGHT
from spice_dist.data.packed_files import packed_source
from spice_dist.data.remote import is_remote, remote_files
from spice_dist.data.sources import Source, files_source
from spice_dist.errors import UserError

LISTING, STARTS = "images.jsonl", "starts.npy"  # name and place of each image; where in that each part begins
SEEN = 3  # files that every process must see


@dataclass(frozen=True)
class Excerpts:
    """The parts of a source; all have `size` images but the last."""

    data: str  # as for `open_given`, with an absolute path
    trust_list: bool
    packed: bool  # a file that this program packed for this user
    listing: Path | None  # the folder with LISTING and STARTS; None: every process opens the whole source
    count: int  # of images
    size: int
    seen: tuple[tuple[str, int], ...] = ()  # some of the files, and their bytes

    @property
    def parts(self) -> int:
        return -(-self.count // self.size)

    def numbers(self, part: int) -> range:
        """Return the numbers that the images of a part have in the source."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def open(self, part: int) -> Source:
        """Open the images of a part, which are numbered from 0 there.

        Raises:
            UserError: the images cannot be opened here, or are not as many.
        """
        numbers = self.numbers(part)
        if self.listing is None:
            return _cut(_whole(self), numbers)
        with open(self.listing / LISTING, "rb") as file:
            file.seek(int(np.load(self.listing / STARTS, mmap_mode="r", allow_pickle=False)[part]))
            rows = [json.loads(file.readline()) for _ in numbers]
        names, places = [name for name, _ in rows], [place for _, place in rows]
        if is_remote(self.data):
            return remote_files(self.data, names, [(size, stamp) for size, stamp in places])
        return files_source(self.data, names, Path(), places=places)

    def require_seen(self) -> None:
        """Raise UserError if this machine does not see the same files: it would call them unreadable."""
        for name, size in self.seen:
            try:
                problem = "" if os.stat(name).st_size == size else "it is another file there"
            except OSError as error:
                problem = error.strerror or str(error)
            if problem:
                raise UserError(
                    f"the node {socket.gethostname()} does not see {name!r} ({problem}); give images on storage that "
                    "every node of the cluster mounts at the same place"
                )


def excerpts(source: Source, data: str, trust_list: bool, size: int, folder: Path) -> Excerpts:
    """Divide what `data` has opened as `source` into parts of `size` images; leave in `folder` what opening them takes.

    Raises:
        UserError: it cannot be written.
    """
    count = len(source.paths)
    if source.file is None and source.listed is None:
        return Excerpts(source.name, trust_list, is_ours(source.name), None, count, size)
    starts = []
    with publish(folder / LISTING) as file:
        for i, name in enumerate(source.paths):
            if i % size == 0:
                starts.append(file.tell())
            place = str(source.file(i).absolute()) if source.file else source.listed and source.listed(i)
            file.write(json.dumps([name, place]).encode("ascii") + b"\n")
    with publish(folder / STARTS) as file:
        np.save(file, np.array(starts))
    return Excerpts(data, trust_list, False, folder, count, size, tuple(_seen(source)))


def _seen(source: Source) -> Iterator[tuple[str, int]]:
    """Yield the place and the size of the first files that exist."""
    if source.file is None:
        return
    places = (str(source.file(i).absolute()) for i in range(min(SOUGHT, len(source.paths))))
    yield from islice(((place, os.stat(place).st_size) for place in places if os.path.isfile(place)), SEEN)


@cache
def _whole(opened: Excerpts) -> Source:
    path = Path(opened.data)
    source = packed_source(path) if opened.packed else open_given(opened.data, trust_list=opened.trust_list)
    if len(source.paths) != opened.count:
        raise UserError(
            f"the node {socket.gethostname()} sees {len(source.paths):,} images in {opened.data!r}, not "
            f"{opened.count:,}; give images on storage that every node of the cluster mounts at the same place"
        )
    return source


def _cut(source: Source, numbers: range) -> Source:
    """Return the images of these numbers alone, without labels."""
    stamps = source.stamps
    return replace(
        source,
        paths=source.paths[numbers.start : numbers.stop],
        read=lambda i: source.read(numbers[i]),
        stamps=None if stamps is None else lambda i: stamps(numbers[i]),
        labels=None,
        extra=0,
        held_out=0,
    )
