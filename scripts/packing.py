"""The sources as the one file that a submission ships; its bytes count against the cap.

    python scripts/packing.py              # packed code: 38592 bytes of 40000 wanted (train_gpt.py 23103, export.py 15489)
    python scripts/packing.py --check      # exit 1 above what is wanted

The file is a loader and a payload: the sources, minified by python-minifier (comments, docstrings, the knobs' help and the
annotations of functions go, locals and globals that no other module reaches get short names), under bzip2, as a string
literal of Latin-1 characters, one a byte. Measured on 106 kB of minified code: bzip2 makes 37,071 bytes of it, raw LZMA at
its best settings 37,705, brotli, which the standard library lacks, 36,377. The literal's escapes add 2 %; base85 would add
25 % (46,339 bytes), the densest UTF-8 text 12 %. The price: a tool that decodes the file as UTF-8 fails on it. Python and
torchrun heed its first line, and whoever counts bytes counts those of the file.

The same sources give the same bytes under Python 3.10, 3.11, 3.12 and 3.13 (measured) for one version of python-minifier,
which requirements.txt pins, and of bzip2, whose encoder has been the same since 1.0. A run logs the count that it made, and
scripts/pack_submission.py refuses to ship what packs to another.
"""
from __future__ import annotations

import ast
import bz2
import hashlib
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

try:
    import python_minifier
    from python_minifier import f_string  # pyright: ignore[reportAttributeAccessIssue]
except ModuleNotFoundError:
    from export import ExportRefused

    raise ExportRefused("counting the code needs python-minifier; pip install -r requirements.txt") from None

ENTRY = "train_gpt"
WANTED_BYTES = 40_000
SCRIPTS = Path(__file__).resolve().parent
CACHE = SCRIPTS / "__pycache__"         # which git ignores
CACHED_FILES = 32         # as many sets of tools are in use at a time: tests and sweeps go through a dozen
# Other modules are imported from the payload on demand; train_gpt runs in the file's own place and answers to both names.
# `sources` is what export.tool asks for. The hook is for Pythons before 3.13, whose own printer of tracebacks looks for
# source lines in files alone; the line that runs the sources stands apart from the payload, because tracebacks show it.
UNPACKER = '''\
# coding:latin-1
import bz2,linecache,sys,traceback
from importlib.util import spec_from_loader
class Packed:
 t=bz2.decompress({payload}.encode("latin-1")).decode().split("\\0")
 sources=dict(zip(t[::2],t[1::2]))
 def find_spec(n,*_):return spec_from_loader(n,Packed)if n in Packed.sources else None
 def create_module(_):0
 def exec_module(m,n=0):
  n=n or m.__name__;s=Packed.sources[n];m.__file__,f=__file__,__file__+"/"+n+".py"
  linecache.cache[f]=len(s),None,s.splitlines(True),f
  exec(compile(s,f,"exec"),m.__dict__)
sys.meta_path.insert(0,Packed)
sys.excepthook=traceback.print_exception
sys.modules["{entry}"]=sys.modules[__name__]
Packed.exec_module(sys.modules[__name__],"{entry}")
'''


def print_f_strings_for_all_pythons() -> None:
    """python-minifier writes f-strings in the grammar of the Python that it runs on, which since 3.12 is one that older ones
    cannot read. With the old grammar 3.10, 3.11, 3.12 and 3.13 give the same bytes, and all of them run the file.
    """
    init = f_string.OuterFString.__init__
    f_string.OuterFString.__init__ = lambda self, node, pep701=False: init(self, node, pep701=False)


print_f_strings_for_all_pythons()


def pack_code(sources: Mapping[str, str]) -> bytes:
    """One self-extracting file of sources by name, with or without ".py". Raises ValueError without a train_gpt."""
    return self_extracting(minified({Path(name).stem: source for name, source in sources.items()}))


def minified(sources: Mapping[str, str]) -> dict[str, str]:
    """The same program in fewer characters. What other modules reach keeps its name, and so do classes: a traceback ends
    with one, and state dicts, knobs and headers hold attributes, which all do.
    """
    trees = {name: WithoutHelp().visit(ast.parse(source)) for name, source in sorted(sources.items())}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    reached = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    reached |= {node.name for node in nodes if isinstance(node, (ast.alias, ast.ClassDef))}
    # Hoisting repeated literals into variables makes the text shorter and what bzip2 makes of it longer.
    return {name: python_minifier.minify(
        python_minifier.unparse(tree), name, remove_literal_statements=True, rename_globals=True,
        preserve_globals=sorted(reached), hoist_literals=False) for name, tree in trees.items()}


class WithoutHelp(ast.NodeTransformer):
    """Empties group and text of each `knob(default, group, text, ...)`; scripts/knobs.py alone reads them."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if isinstance(node.func, ast.Name) and node.func.id == "knob":
            node.args[1:3] = [ast.Constant("") for _ in node.args[1:3]]
        return node


def self_extracting(texts: Mapping[str, str]) -> bytes:
    if ENTRY not in texts:
        raise ValueError(f"packing needs {ENTRY}, got {', '.join(texts) or 'nothing'}")
    packed = bz2.compress("\0".join(part for name in sorted(texts) for part in (name, texts[name])).encode())
    return UNPACKER.format(payload=literal(packed), entry=ENTRY).encode("latin-1")


def literal(data: bytes) -> str:
    """A Python string literal of one character a byte, in a source that says it is Latin-1."""
    text = data.decode("latin-1").translate(str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"}))
    text = re.sub("\0(?=[0-7])", r"\\x00", text).replace("\0", r"\0")
    return f'"{text}"'


def with_imports(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files, and the modules of scripts/ that those of them in scripts/ import."""
    found = [Path(path).resolve() for path in paths]
    for path in found:                  # grows under way
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.parent == SCRIPTS else ()
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            files = [SCRIPTS / f"{name}.py" for name in names]
            found += [file for file in files if file.is_file() and file not in found]
    return found


def packed_code(paths: Iterable[str | os.PathLike[str]]) -> bytes:
    """The sources in these files as a submission ships them; remembered, because minifying takes some three seconds."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in map(Path, paths)}
    tools = Path(__file__).read_text(encoding="utf-8"), importlib.metadata.version("python-minifier")
    file = CACHE / f"packed-{hashlib.sha256(repr((tools, sorted(sources.items()))).encode()).hexdigest()[:32]}"
    try:
        return file.read_bytes()
    except OSError:
        packed = pack_code(sources)
    remember(file, packed)
    return packed


def packed_code_bytes(paths: Iterable[str | os.PathLike[str]]) -> int:
    return len(packed_code(paths))


def remember(file: Path, packed: bytes) -> None:
    """Keeps the newest few; several processes may do so at once, and a folder that cannot be written to is left alone."""
    try:
        CACHE.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as temporary:
            temporary.write(packed)
        os.replace(temporary.name, file)
        for old in sorted(CACHE.glob("packed-*"), key=os.path.getmtime)[:-CACHED_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        pass


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python scripts/packing.py [--check]", file=sys.stderr)
        return 2
    texts = minified({name: (SCRIPTS.parent / f"{name}.py").read_text(encoding="utf-8") for name in (ENTRY, "export")})
    total, entry = len(self_extracting(texts)), len(self_extracting({ENTRY: texts[ENTRY]}))
    print(f"packed code: {total} bytes of {WANTED_BYTES} wanted (train_gpt.py {entry}, export.py {total - entry})")
    return int(bool(arguments) and total > WANTED_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
