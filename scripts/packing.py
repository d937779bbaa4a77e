"""The sources as the one file that a submission ships; its bytes count against the cap."""
from __future__ import annotations

import ast
import base64
import lzma
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

ENTRY = "train_gpt"
# The hook is for Pythons before 3.13, whose own printer of tracebacks looks for source lines in files alone.
UNPACKER = '''\
import base64,linecache,lzma,sys,traceback,types
sys.excepthook=traceback.print_exception
for n,s in zip(*[iter(lzma.decompress(base64.b85decode("{payload}")).decode().split("\\0"))]*2):
 m=sys.modules[__name__] if n=="{entry}" else types.ModuleType(n)
 m.__file__,f,sys.modules[n]=__file__,__file__+"/"+n+".py",m
 linecache.cache[f]=len(s),None,s.splitlines(True),f
 exec(compile(s,f,"exec"),m.__dict__)
'''


def pack_code(sources: Mapping[str, str]) -> str:
    """One self-extracting file: other modules are registered by name, then train_gpt runs in the file's own place."""
    by_name = {Path(name).stem: source for name, source in sources.items()}
    if ENTRY not in by_name:
        raise ValueError(f"packing needs {ENTRY}, got {', '.join(by_name) or 'nothing'}")
    names = [*sorted(by_name.keys() - {ENTRY}), ENTRY]
    text = "\0".join(part for name in names for part in (name, without_comments(by_name[name])))
    packed = lzma.compress(text.encode("utf-8"), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return UNPACKER.format(payload=base64.b85encode(packed).decode("ascii"), entry=ENTRY)


def without_comments(source: str) -> str:
    """The same program without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def packed_code_bytes(paths: Iterable[str | os.PathLike[str]]) -> int:
    """What the sources weigh in a submission."""
    return len(pack_code({path.name: path.read_text(encoding="utf-8") for path in map(Path, paths)}).encode("utf-8"))
