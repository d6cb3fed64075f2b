"""A frozen cache as one file in safetensors layout.

Layout: header length (8 bytes, little-endian), a JSON header, then the tensors without
holes. Keys and values come first, each part whole as [L, rows, g, d] in the cache's
dtype (l1.keys, l1.values, l2.keys, l2.values, recent.keys, recent.values), then ids I32
[n], offsets [text tokens, 2] and text U8 where a text was given. The header's
__metadata__ holds versions, fingerprints, the build options and a CRC-32 of every
tensor and of the header itself. The data begins at a multiple of 64 bytes.

One idea: what is on disk under the final name is always whole. A save writes to a
temporary file beside it and renames; a load reads the header, the ids and the text, and
maps the keys and values. A file that was renamed over while mapped stays readable.
Refuses, with CacheFileError naming the file, what is damaged or belongs to another
model, tokenizer, adapter, frame or parameters. A save that was killed leaves a hidden
".NAME.*.tmp" beside the old file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from acre import _core
from acre.chat import Frame
from acre.errors import CacheFileError
from acre.files import CHUNK, check_space, replacing, write
from acre.safetensors_file import Entry
from acre.tokenizer import Tokenizer

FORMAT, FORMAT_VERSION = "acre-cache", "1"
HEADER_MAX = 1 << 20
ALIGNMENT = 64
ITEM_SIZES = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8, "U8": 1}
PARTS = {
    "l1.keys": "l1_keys",
    "l1.values": "l1_values",
    "l2.keys": "l2_keys",
    "l2.values": "l2_values",
    "recent.keys": "recent_keys",
    "recent.values": "recent_values",
}
OPTIONS = (
    "interval", "window", "stride", "carry", "eta", "reserve", "weight", "sink",
)  # fmt: skip
FINGERPRINTS = ("model", "tokenizer", "adapter", "frame")
HEADER_CRC, ZERO_CRC = "crc32.header", "00000000"


@dataclass(frozen=True)
class Facts:
    """What a cache knows beside its tensors.

    fingerprints by name (model, tokenizer, adapter, frame); prefix: frame tokens before
    the text; frame: how to make it again; text, offsets: None when ids were given.
    """

    fingerprints: dict[str, str]
    w_max: int
    dtype: str
    prefix: int
    frame: dict[str, Any]
    text: str | None
    offsets: np.ndarray | None


@dataclass(frozen=True)
class Stored:
    """An opened file, checked in itself but not yet against a model."""

    path: str
    identity: tuple[int, int, int]
    entries: dict[str, Entry]
    checksums: dict[str, str]
    options: dict[str, Any]
    facts: Facts
    ids: np.ndarray
    version: str


# ------------------------------------------------------------------------------- frames


def frame_fingerprint(frame: Frame | None) -> str:
    """What decides how questions are framed; "none" without a frame."""
    return "none" if frame is None else frame.fingerprint


def frame_record(frame: Frame | None) -> dict[str, Any]:
    """How `restore_frame` makes the frame again."""
    if frame is None:
        return {"kind": "none"}
    if type(frame) is not Frame:
        return {"kind": "custom"}
    return {"kind": "chat", **frame.options}


def restore_frame(
    stored: Stored, tokenizer: Tokenizer | None, given: Frame | None
) -> Frame | None:
    """The frame of a stored cache: the given one, or made again from its record.

    CacheFileError when it is not the one that the cache was built with.
    """
    record = dict(stored.facts.frame)
    kind = record.pop("kind", None)
    if given is not None:
        frame: Frame | None = given
    elif kind == "none":
        frame = None
    elif kind == "chat" and tokenizer is not None:
        try:
            frame = Frame(tokenizer, **record)
        except (TypeError, ValueError) as error:
            raise CacheFileError(f"{stored.path}: frame: {error}") from error
    else:
        raise CacheFileError(f"{stored.path}: frame: was a custom one, pass frame=")
    _check_print(stored, "frame", frame_fingerprint(frame))
    return frame


def _check_print(stored: Stored, name: str, here: str) -> None:
    there = stored.facts.fingerprints[name]
    if there != here:
        raise CacheFileError(
            f"{stored.path}: belongs to another {name}: fingerprint {there[:12]} in "
            f"the file, {here[:12]} here"
        )


# ------------------------------------------------------------------------------- saving


def _layers(core: _core.Cache, part: str, layers: int) -> Iterator[np.ndarray]:
    """The bytes of one part in file order, layer by layer, page by page; no copies but
    of chunks that do not lie contiguously."""
    pages = core.pages if part.startswith("l2") else 1
    for layer in range(layers):
        for page in range(pages):
            array = np.asarray(core.view(part, layer, page)[0])
            if array.size == 0:
                continue
            step = max(1, CHUNK // max(1, array.nbytes // array.shape[0]))
            for row in range(0, array.shape[0], step):
                block = np.ascontiguousarray(array[row : row + step])
                yield block.reshape(-1).view(np.uint8)


def _small(core: _core.Cache, facts: Facts) -> dict[str, np.ndarray]:
    """The tensors after the keys and values, largest items first."""
    out = {}
    if facts.offsets is not None:
        out["offsets"] = np.ascontiguousarray(facts.offsets)
    out["ids"] = np.ascontiguousarray(core.ids)
    if facts.text is not None:
        out["text"] = np.frombuffer(facts.text.encode("utf-8"), dtype=np.uint8)
    return out


def _shapes(
    core: _core.Cache, facts: Facts, small: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, list[int]]]:
    """name -> (dtype, shape) of every tensor in file order."""
    config, plan = core.model.config, core.plan
    tail = [config["kv_heads"], config["head_dim"]]
    kind = {"f32": "F32", "bf16": "BF16"}[facts.dtype]
    kinds = {"int32": "I32", "int64": "I64", "uint8": "U8"}
    out = {
        name: (kind, [config["layers"], rows, *tail])
        for name, rows in _rows(plan).items()
    }
    for name, array in small.items():
        out[name] = (kinds[str(array.dtype)], list(array.shape))
    return out


def _rows(plan: Mapping[str, int]) -> dict[str, int]:
    """Rows of each part by the plan."""
    rows = {"l1": plan["m"], "l2": plan["l2_tokens"], "recent": plan["recent"]}
    return {name: rows[name.split(".")[0]] for name in PARTS}


def _metadata(core: _core.Cache, facts: Facts) -> dict[str, str]:
    plan = core.plan
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "acre_version": _core.__version__,
        **{f"fingerprint.{name}": facts.fingerprints[name] for name in FINGERPRINTS},
        "proxy": core.proxy,
        "options": json.dumps({name: plan[name] for name in OPTIONS}),
        "dtype": facts.dtype,
        "w_max": str(facts.w_max),
        "prefix_tokens": str(facts.prefix),
        "frame": json.dumps(facts.frame),
    }


def _header(
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[str, list[int]]],
    checksums: Mapping[str, str],
) -> bytes:
    """Length field and padded JSON. Its size does not depend on the checksums."""
    meta = dict(metadata)
    for name in shapes:
        meta[f"crc32.{name}"] = checksums.get(name, ZERO_CRC)
    meta[HEADER_CRC] = ZERO_CRC
    table: dict[str, Any] = {"__metadata__": meta}
    begin = 0
    for name, (dtype, shape) in shapes.items():
        end = begin + math.prod(shape) * ITEM_SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + _sealed(text)


def _sealed(text: bytes) -> bytes:
    """The header with its own checksum filled in."""
    mark = f'"{HEADER_CRC}":"'.encode()
    return text.replace(
        mark + ZERO_CRC.encode(), mark + f"{zlib.crc32(text):08x}".encode()
    )


def _write_all(file: BinaryIO, directory: str, core: _core.Cache, facts: Facts) -> None:
    """Header with empty checksums, the tensors, then the header again."""
    small = _small(core, facts)
    shapes, metadata = _shapes(core, facts, small), _metadata(core, facts)
    layers, sums = core.model.config["layers"], {}
    blank = _header(metadata, shapes, {})
    sizes = [math.prod(shape) * ITEM_SIZES[dtype] for dtype, shape in shapes.values()]
    check_space(directory, len(blank) + sum(sizes))
    write(file, blank)
    for name in shapes:
        crc = 0
        part = PARTS.get(name)
        for chunk in _layers(core, part, layers) if part else _cut(small[name]):
            write(file, chunk)
            crc = zlib.crc32(chunk, crc)
        sums[name] = f"{crc:08x}"
    if file.tell() != len(blank) + sum(sizes):
        raise OSError(errno.EIO, "the cache's size is not that of its plan")
    file.seek(0)
    write(file, _header(metadata, shapes, sums))


def _cut(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array's bytes in chunks."""
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


def save(path: str | os.PathLike[str], core: _core.Cache, facts: Facts) -> None:
    """Writes a cache under `path`, atomically; on any failure an old file stays.

    OSError names the path. Memory: one chunk at a time.
    """
    with replacing(path) as raw:
        directory = os.path.dirname(os.path.realpath(os.fsdecode(path)))
        _write_all(raw, directory, core, facts)


# ------------------------------------------------------------------------------ loading


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def _fail(path: str, what: str) -> CacheFileError:
    return CacheFileError(f"{path}: {what}")


def _read_header(path: str, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """(header, where the data begins); the header is whole and its checksum right."""
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(HEADER_MAX, size - 8):
        raise _fail(path, f"no acre cache, or cut: header of {length} in {size} bytes")
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _fail(path, f"damaged header: {error}") from None
    meta = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise _fail(path, "no acre cache")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise _fail(path, f"format version {found!r}, this acre reads {FORMAT_VERSION}")
    found = meta.get(HEADER_CRC)
    mark = f'"{HEADER_CRC}":"'.encode()
    blank = raw.replace(mark + str(found).encode(), mark + ZERO_CRC.encode())
    if found != f"{zlib.crc32(blank):08x}":
        raise _fail(path, "damaged header: its checksum does not match")
    if not all(isinstance(value, str) for value in meta.values()):
        raise _fail(path, "damaged header: __metadata__ holds other than strings")
    return header, 8 + length


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _entry(path: str, name: str, item: Any, base: int) -> Entry:
    """One tensor's header entry; its range must be that of its shape and dtype."""
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise _fail(path, f"damaged header: tensor {name!r}")
    dtype, shape, place = item["dtype"], item["shape"], item["data_offsets"]
    good = (
        isinstance(dtype, str)
        and dtype in ITEM_SIZES
        and isinstance(shape, list)
        and len(shape) <= 4
        and all(map(_is_count, shape))
        and isinstance(place, list)
        and len(place) == 2
        and all(map(_is_count, place))
    )
    if not good or place[1] - place[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise _fail(path, f"damaged header: tensor {name!r} has no proper range")
    return Entry(dtype, tuple(shape), base + place[0], base + place[1])


def _entries(
    path: str, header: dict[str, Any], base: int, size: int
) -> dict[str, Entry]:
    """All tensors: the known names, side by side from the header to the file's end."""
    items = {k: v for k, v in header.items() if k != "__metadata__"}
    known = {*PARTS, "ids", "offsets", "text"}
    missing = {*PARTS, "ids"} - set(items)
    if missing or set(items) - known:
        odd = sorted(missing or set(items) - known)
        raise _fail(path, f"tensors {odd} are {'missing' if missing else 'unknown'}")
    out = {name: _entry(path, name, item, base) for name, item in items.items()}
    place = base
    for name, entry in sorted(out.items(), key=lambda one: (one[1].begin, one[1].end)):
        if entry.begin != place:
            raise _fail(path, f"tensor {name!r} overlaps another, or leaves a hole")
        place = entry.end
    if place != size:
        raise _fail(path, f"has {size} bytes, its header describes {place}")
    return out


def _read(
    path: str, file: BinaryIO, entry: Entry, name: str, checksums: Mapping[str, str]
) -> bytes:
    """A small tensor's bytes, checked."""
    file.seek(entry.begin)
    data = file.read(entry.end - entry.begin)
    if len(data) != entry.end - entry.begin:
        raise _fail(path, f"cut inside {name!r}")
    if checksums[name] != f"{zlib.crc32(data):08x}":
        raise _fail(path, f"damaged: the checksum of {name!r} does not match")
    return data


def _number(path: str, meta: Mapping[str, str], name: str) -> int:
    text = meta.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _fail(path, f"damaged header: {name} is {text[:40]!r}")
    return int(text)


def _table(path: str, meta: Mapping[str, str], name: str) -> dict[str, Any]:
    """A JSON object among the metadata."""
    try:
        table = json.loads(meta.get(name, ""), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise _fail(path, f"damaged header: {name}")
    return table


def _options(path: str, meta: Mapping[str, str]) -> dict[str, Any]:
    """The build options, resolved, as the core takes them."""
    options = _table(path, meta, "options")
    if set(options) != set(OPTIONS) or not all(map(_is_count, options.values())):
        raise _fail(path, "damaged header: options")
    if meta.get("proxy") not in ("pooled", "trained"):
        raise _fail(path, f"damaged header: proxy is {meta.get('proxy')!r}")
    return {"proxy": meta["proxy"], **options}


def _text(
    path: str, data: dict[str, bytes], entries: Mapping[str, Entry], tokens: int
) -> tuple[str | None, np.ndarray | None]:
    """(text, offsets [tokens, 2]); the offsets lie inside the text."""
    if ("text" in data) != ("offsets" in data):
        raise _fail(path, "has only one of text and offsets")
    if "text" not in data:
        return None, None
    entry = entries["offsets"]
    if entries["text"].dtype != "U8" or entry.dtype not in ("I32", "I64"):
        raise _fail(path, "text or offsets are of another dtype")
    if entry.shape != (tokens, 2):
        raise _fail(path, f"offsets are {list(entry.shape)}, expected [{tokens}, 2]")
    try:
        text = data["text"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _fail(path, f"text is no UTF-8 at byte {error.start}") from None
    kind = "<i4" if entry.dtype == "I32" else "<i8"
    offsets = np.frombuffer(data["offsets"], dtype=kind).reshape(tokens, 2)
    inside = (offsets >= 0).all() and (offsets <= len(text)).all()
    if not inside or (offsets[:, 0] > offsets[:, 1]).any():
        raise _fail(path, "offsets lie outside the text")
    return text, offsets


def open_file(path: str | os.PathLike[str]) -> Stored:
    """Reads and checks all but the keys and values.

    FileNotFoundError and other OSErrors of opening; CacheFileError for the content.
    """
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        status = os.fstat(file.fileno())
        header, base = _read_header(name, file, status.st_size)
        entries = _entries(name, header, base, status.st_size)
        meta = header["__metadata__"]
        sums = {key: meta.get(f"crc32.{key}", "") for key in entries}
        small = [key for key in ("ids", "offsets", "text") if key in entries]
        data = {key: _read(name, file, entries[key], key, sums) for key in small}
    if entries["ids"].dtype != "I32" or len(entries["ids"].shape) != 1:
        raise _fail(name, "ids are not I32 [n]")
    ids = np.frombuffer(data["ids"], dtype="<i4")
    prefix = _number(name, meta, "prefix_tokens")
    if not 0 <= prefix < len(ids):
        raise _fail(name, f"prefix of {prefix} in {len(ids)} tokens")
    text, offsets = _text(name, data, entries, len(ids) - prefix)
    prints = {key: meta.get(f"fingerprint.{key}", "") for key in FINGERPRINTS}
    facts = Facts(
        prints, _number(name, meta, "w_max"), meta.get("dtype", ""), prefix,
        _table(name, meta, "frame"), text, offsets,
    )  # fmt: skip
    return Stored(
        name,
        (status.st_dev, status.st_ino, status.st_size),
        entries,
        sums,
        _options(name, meta),
        facts,
        ids,
        meta.get("acre_version", ""),
    )


def check_match(
    stored: Stored, fingerprints: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """CacheFileError naming what differs: model, tokenizer, adapter, dtype or w_max."""
    for name in ("model", "tokenizer", "adapter"):
        _check_print(stored, name, fingerprints[name])
    facts = stored.facts
    for name, there in (("dtype", facts.dtype), ("w_max", facts.w_max)):
        if there != config[name]:
            raise _fail(
                stored.path,
                f"belongs to other parameters: {name} is {there} in the file, "
                f"{config[name]} here",
            )


def verify(stored: Stored) -> None:
    """Reads every tensor once; CacheFileError naming one whose checksum is wrong."""
    with open(stored.path, "rb", buffering=0) as file:
        for name, entry in stored.entries.items():
            file.seek(entry.begin)
            crc, left = 0, entry.end - entry.begin
            while left and (chunk := file.read(min(left, CHUNK))):
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            if left or stored.checksums[name] != f"{crc:08x}":
                raise _fail(
                    stored.path, f"damaged: the checksum of {name!r} does not match"
                )


def restore(stored: Stored, model: _core.Model) -> _core.Cache:
    """The frozen core cache over the mapped file; every size checked against the model.

    CacheFileError; MemoryError where even the L1 entries do not fit.
    """
    config, path = model.config, stored.path
    try:
        plan = model.plan(len(stored.ids), **stored.options)
        kind = {"f32": "F32", "bf16": "BF16"}[config["dtype"]]
        blocks = {}
        for name, rows in _rows(plan).items():
            entry = stored.entries[name]
            shape = (config["layers"], rows, config["kv_heads"], config["head_dim"])
            if entry.shape != shape or entry.dtype != kind:
                raise _fail(
                    path,
                    f"{name} is {entry.dtype} {list(entry.shape)}, expected {kind} "
                    f"{list(shape)}",
                )
            if rows:
                blocks[PARTS[name]] = (entry.begin, entry.end - entry.begin)
        core = _core.Cache.restore(model, stored.ids, stored.options, path, blocks)
        status = os.stat(path)
    except CacheFileError:
        raise
    except (ValueError, OverflowError, RuntimeError) as error:
        raise _fail(path, str(error)) from error
    if (status.st_dev, status.st_ino, status.st_size) != stored.identity:
        raise _fail(path, "was replaced while it was being opened; load it again")
    return core


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts of a stored cache for people; needs no model. Errors as `open_file`."""
    stored = open_file(path)
    facts = stored.facts
    return {
        "file_bytes": stored.identity[2],
        "acre_version": stored.version,
        "n": len(stored.ids),
        "m": stored.entries["l1.keys"].shape[1],
        "l2_tokens": stored.entries["l2.keys"].shape[1],
        "recent": stored.entries["recent.keys"].shape[1],
        **stored.options,
        "dtype": facts.dtype,
        "w_max": facts.w_max,
        "frame": facts.frame.get("kind"),
        "text_characters": None if facts.text is None else len(facts.text),
        "fingerprints": dict(facts.fingerprints),
    }
