"""The verbs of export.py, and the readers of checkpoints that they start from.

    python export.py predict|write|inspect|eval|extract|verify ...
    python export.py write final_model.safetensors -o final_model.rd.ptz EXPORT_SCHEME=rd EXPORT_BITS=3 \\
        --calibration-tokens 131072 --data DIR --tokenizer MODEL     # knobs by name or as flags: --export-bits 3

Nothing here is needed to train, export, read back and score, so nothing of it is in a submission, whose bytes count.
"""
from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from calibration import CALIBRATION_CHUNK_TOKENS, calibrate
from export import (
    FLOATS,
    MAGIC,
    MAX_RAW_BYTES,
    ArtifactError,
    ExportOptions,
    PlanRow,
    Statistics,
    Stored,
    dtype_name,
    encode_artifact,
    load_artifact,
    pack_meta,
    parse_meta,
    plan_lines,
    range_problems,
    require,
    restore,
    shapes_of,
    sum_squares,
    tool,
    weights_digest,
    write_atomically,
)
from sensitivity_map import read_sensitivity
from train_gpt import (
    GPT,
    Config,
    ConfigError,
    DataError,
    EvalResult,
    Runtime,
    Tokenizer,
    TokenStream,
    byte_table,
    check_pairing,
    evaluate,
    load_model,
    parse_knob,
    read_split,
    read_validation,
    shape_from_meta,
)

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: ours and the challenge's, told apart by their first bytes and never trusted.
# ----------------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(state, meta or None) of a .safetensors file, the baseline's final_model.pt, or its final_model.int8.ptz."""
    with open(path, "rb") as file:
        head = file.read(9)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        try:
            if head[:4] == b"PK\x03\x04":
                return checked_state(load_torch(file, size)), None
            if head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0:       # zlib's own check
                require(size <= MAX_RAW_BYTES, "checkpoint", 0, f"{size} bytes", f"at most {MAX_RAW_BYTES}")
                raw = inflate_zlib(file.read())
                return restore_baseline(load_torch(io.BytesIO(raw), len(raw))), None
            if head[8:] == b"{":
                return load_safetensors(path)
        except ArtifactError:
            raise
        except Exception as fault:      # the parsers of other people's formats raise whatever they like
            reason = " ".join(f"{type(fault).__name__} ({fault})".split())[:200]
            raise ArtifactError("checkpoint", 0, reason, "a readable checkpoint") from fault
    raise ArtifactError("checkpoint", 0, head, "a safetensors file, a PyTorch zip or a zlib stream")


def load_torch(file: BinaryIO | io.BytesIO, size: int) -> Any:
    """torch.load without pickle's powers, of an archive that cannot unfold into more than it is."""
    entries = zipfile.ZipFile(file).infolist()
    flat = sum(e.file_size for e in entries) <= size and all(e.compress_type == zipfile.ZIP_STORED for e in entries)
    require(flat, "checkpoint", 0, "a compressed archive", "stored entries, as torch.save writes them")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def inflate_zlib(data: bytes) -> bytes:
    unpacker = zlib_ng.decompressobj()
    raw = unpacker.decompress(data, MAX_RAW_BYTES)
    whole = unpacker.eof and not unpacker.unused_data
    require(whole, "checkpoint", 0, f"no end at its {len(raw)} bytes", f"a zlib stream of below {MAX_RAW_BYTES} bytes")
    return raw


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A checkpoint of ours may hold more than the model: its weights then carry the prefix `model.`."""
    from safetensors import safe_open  # only checkpoints need it

    with safe_open(path, framework="pt", device="cpu") as file:
        text, names = (file.metadata() or {}).get("artifact_meta"), list(file.keys())
        names = [name for name in names if name.startswith("model.")] or names
        state = checked_state({name.removeprefix("model."): file.get_tensor(name) for name in names})
    return state, None if text is None else parse_meta(text.encode(), "checkpoint artifact_meta", None)


def checked_state(state: Any) -> dict[str, Tensor]:
    """A dict of dense tensors of bounded size; a pickle can claim any shape through strides of zero."""
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    require(named, "checkpoint", 0, f"a {type(state).__name__}", "a dict of named tensors")
    for name, t in state.items():
        dense = isinstance(t, Tensor) and t.layout == torch.strided and not (t.is_nested or t.is_quantized or t.is_meta)
        require(dense, f"checkpoint tensor {name!a}", 0, f"a {type(t).__name__}", "a dense tensor")
    total = sum(t.numel() * t.element_size() for t in state.values())
    require(total <= MAX_RAW_BYTES, "checkpoint", 0, f"{total} bytes of tensors", f"at most {MAX_RAW_BYTES}")
    return {name: tensor.detach() for name, tensor in state.items()}


def restore_baseline(packed: Any) -> dict[str, Tensor]:
    """The state in the baseline's int8 dict: codes x scales, beside kept tensors in the dtype they had."""
    form = packed.get("__quant_format__") if isinstance(packed, dict) else None
    require(form == "int8_clean_per_row_v1", "checkpoint __quant_format__", 0, repr(form), "int8_clean_per_row_v1")
    codes, scales, state = (checked_state(packed.get(part)) for part in ("quantized", "scales", "passthrough"))
    dtypes = {**packed.get("dtypes", {}), **packed.get("passthrough_orig_dtypes", {})}
    paired = codes.keys() == scales.keys() and codes.keys() <= dtypes.keys() <= codes.keys() | state.keys()
    require(paired and not codes.keys() & state.keys(), "checkpoint", 0, "tensors without scales or dtype", "both")
    unknown = sorted({str(dtype) for dtype in dtypes.values()} - set(FLOATS))
    require(not unknown, "checkpoint dtypes", 0, unknown, ", ".join(FLOATS))
    for name, q in codes.items():
        scale = scales[name].float()
        fits = q.dtype == torch.int8 and tuple(scale.shape) in ((), tuple(q.shape[:1]))
        found = f"{q.dtype}, scales {tuple(scale.shape)}"
        require(fits, f"checkpoint tensor {name!a}", 0, found, "int8 codes and a scale, or one per row")
        state[name] = q.float() * scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))
    return {name: t.to(getattr(torch, dtypes[name])) if name in dtypes else t for name, t in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Models outside a run.
# ----------------------------------------------------------------------------------------------------------------------


def meta_from_state(state: Mapping[str, Tensor], overrides: Mapping[str, str]) -> dict[str, Any]:
    """The header for weights that come without one (the challenge's checkpoints), from the tensors' shapes.

    `overrides` holds knobs that shapes cannot tell, such as ROPE_BASE, LOGIT_SOFTCAP or NUM_LAYERS when blocks are
    shared; values as in the environment. Raises ArtifactError when the state is not a GPT of this program.
    """
    try:
        vocab, width = state["tok_emb.weight"].shape
        kv_dim, dim = state["blocks.0.attn.c_k.weight"].shape
        heads = state["blocks.0.attn.q_gain"].numel()
        hidden = state["blocks.0.mlp.fc.weight"].shape[0]
        kv_heads, mlp_mult = kv_dim * heads // dim, hidden // dim
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ArtifactError("checkpoint", 0, f"no usable tensor {error}", "the weights of a GPT of this program") from None
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    bf16_embedding = state["tok_emb.weight"].dtype is torch.bfloat16
    inferred = {
        "VOCAB_SIZE": vocab, "EMBED_DIM": width if width < dim else 0, "MODEL_DIM": dim, "NUM_HEADS": heads,
        "NUM_KV_HEADS": kv_heads, "MLP_MULT": mlp_mult, "NUM_LAYERS": blocks,
        "TIE_EMBEDDINGS": int("lm_head.weight" not in state), "ROPE_DTYPE": "bfloat16" if bf16_embedding else "float32",
    }
    if "NUM_LAYERS" in overrides:
        inferred["NUM_UNIQUE_BLOCKS"] = blocks
    cfg, problems = Config.parse({**{k: str(v) for k, v in inferred.items()}, **overrides})
    if problems:
        raise ArtifactError("checkpoint", 0, "; ".join(problems), "a consistent shape")
    return {"model": asdict(cfg.shape), "train_seq_len": cfg.train_seq_len}


def evaluate_artifact(
    state: Mapping[str, Tensor], meta: Mapping[str, Any], *, data: str, tokenizer: str, device: str = "auto",
    max_tokens: int = 0, batch_tokens: int = 65_536,
) -> EvalResult:
    """Scores an artifact on the validation shards of the folder `data`. Raises DataError, ArtifactError, ConfigError."""
    rt, model, tok = open_model(state, meta, tokenizer, device)
    seq_len, val = int(meta["train_seq_len"]), paired_validation(data, tok, meta)
    return evaluate(
        lambda x, y: model(x, y, reduction="none"), val, byte_table(tok, rt.device), rt,
        seq_len=seq_len, batch_tokens=max(batch_tokens, seq_len), max_tokens=max_tokens,
    )


def paired_validation(data: str, tok: Tokenizer, meta: Mapping[str, Any]) -> np.ndarray:
    """The validation tokens of the folder `data`, shown to be this tokenizer's."""
    val = read_validation(data, int(meta["train_seq_len"]), tok.vocab_size)
    check_pairing(data, tok, val)
    return val


def mode_knobs(values: Mapping[str, str], meta: Mapping[str, Any]) -> Config | None:
    """The knobs of an evaluation beside the plain one, None where they ask for none. Raises ValueError."""
    given = {f.name: parse_knob(f, values[f.name.upper()]) for f in fields(Config) if f.name.upper() in values}
    if not given:
        return None
    shape = asdict(shape_from_meta(meta))
    cfg = replace(Config(), train_seq_len=int(meta["train_seq_len"]), **shape, **given)
    asked = [f for f in fields(Config) if f.name in given]
    if faults := range_problems(cfg, asked) + (tool("scoring").problems(cfg) if cfg.modes else []):
        raise ValueError("; ".join(faults))
    return cfg if cfg.modes else None


def score_modes(state: Mapping[str, Tensor], meta: Mapping[str, Any], cfg: Config, scheme: str, *, data: str,
                tokenizer: str, device: str, max_tokens: int, kept: Path | None) -> dict[str, Any]:
    """Prints the lines of every mode that `cfg` asks for and returns their entries, as a run's summary.json has them."""
    rt, model, tok = open_model(state, meta, tokenizer, device, cfg.eval_seq_len)
    val = paired_validation(data, tok, meta)
    scoring = tool("scoring")
    tokens = val[:max_tokens + 1] if max_tokens else val
    ev = scoring.Evaluation(model, rt, tokens, byte_table(tok, rt.device), tok.bos_id, cfg, print, kept)
    return scoring.score_all(ev, scheme)


def open_model(state: Mapping[str, Tensor], meta: Mapping[str, Any], tokenizer: str, device: str, max_seq_len: int = 0
               ) -> tuple[Runtime, GPT, Tokenizer]:
    """A model outside a run, with its weights, and the tokenizer that it was trained with."""
    cfg, problems = Config.parse({"DEVICE": device, "ENABLE_TORCH_COMPILE": "0"})
    rt = Runtime.from_config(cfg, {})
    if problems := problems + rt.problems(cfg):
        raise ConfigError(problems)
    tok = Tokenizer(tokenizer)
    made_with = meta.get("tokenizer_sha256")
    if made_with is not None and made_with != tok.sha256:
        raise DataError(f"tokenizer {tokenizer} (sha256 {tok.sha256[:16]}) is not the artifact's ({str(made_with)[:16]})")
    rt.start("auto")
    model = load_model(state, meta, rt, max_seq_len)
    if tok.vocab_size != model.tok_emb.num_embeddings:
        raise DataError(f"tokenizer {tokenizer} has {tok.vocab_size} tokens, the artifact {model.tok_emb.num_embeddings}")
    return rt, model, tok


def calibrate_state(state: Mapping[str, Tensor], meta: Mapping[str, Any], *, data: str, tokenizer: str, device: str,
                    tokens: int) -> Statistics:
    """Statistics of a checkpoint on the first training tokens of the folder `data`. Raises what `evaluate_artifact` does."""
    rt, model, _ = open_model(state, meta, tokenizer, device)
    seq_len = int(meta["train_seq_len"])
    stream = TokenStream(read_split(data, "train"))
    rows = max(1, CALIBRATION_CHUNK_TOKENS // seq_len)
    batches = max(1, -(-tokens // (rows * seq_len)))
    if batches * rows * seq_len > stream.size:
        raise DataError(f"{data} holds {stream.size} training tokens, calibration wants {batches * rows * seq_len}")
    ids = (torch.from_numpy(stream.take(i * rows * seq_len, rows * seq_len).astype(np.int64)).view(rows, seq_len)
           for i in range(batches))
    statistics = calibrate(model, (batch.to(rt.device) for batch in ids), rt, seed=1337)
    return replace(statistics, weights=weights_digest(state))


# ----------------------------------------------------------------------------------------------------------------------
# Command line: one function a verb.
# ----------------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}\n")


def output_path(text: str) -> Path:
    """The type of a flag whose file is written after long work: its folder must be there before."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {Path(text).parent} for {text}")
    return Path(text)


def publish(rows: Sequence[Mapping[str, Any]], lines: Iterable[str], output: Path | None) -> int:
    """Prints the lines of a table; a file takes them and the rows that they were made from."""
    text = "\n".join(lines)
    if output:
        write_atomically(output, (json.dumps({"rows": rows, "table": text}, indent=1) + "\n").encode())
    print(text)
    return 0


NAMED = {       # knobs that a verb takes as NAME=VALUE too
    "write": {f.name.upper() for f in fields(ExportOptions)} | {"CALIBRATION_TOKENS"},
    "eval": {name.upper() for name in train_gpt.MODES},
}


def as_flags(arguments: Sequence[str]) -> list[str]:
    """EXPORT_BITS=3 as --export-bits=3, for each of the verb's own knobs; not behind --knob."""
    names, found = NAMED.get(arguments[0], ()) if arguments else (), list[str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        known = bool(equals) and name in names and found[-1:] != ["--knob"]
        found.append(f"--{name.lower().replace('_', '-')}={value}" if known else argument)
    return found


def write_verb(args: argparse.Namespace) -> int:
    options = ExportOptions(**{f.name: getattr(args, f.name) for f in fields(ExportOptions)})
    if faults := options.problems():
        raise ValueError("; ".join(faults))
    state, meta = read_with_meta(args.checkpoint, args.knob)
    given = given_for(args, state, meta, options)
    export, cap = encode_artifact(state, meta, options, **given), options.artifact_cap_bytes
    report, total = export.report, len(export.data) + given["code_bytes"]
    if cap and total > cap and options.cap_policy != "warn":
        raise ValueError(f"artifact and code take {total} bytes, ARTIFACT_CAP_BYTES={cap}; nothing was written:"
                         " --cap-policy fit makes it fit, warn writes it all the same")
    write_atomically(Path(args.output), export.data)
    if report.planned_bytes:
        print(*plan_lines(export.tensors.values()), sep="\n")
    for line in report.lines():
        print(line)
    print(f"wrote:{args.output} total_bytes:{report.total_bytes} bits_per_weight:{report.bits_per_weight:.4f} "
          f"rms_error:{report.rms_error:.6f} floored_share:{report.floored_share:.4f}")
    return 0


def given_for(args: argparse.Namespace, state: Mapping[str, Tensor], meta: Mapping[str, Any], options: ExportOptions
              ) -> dict[str, Any]:
    """What the command line lets an export know about a model."""
    statistics = None
    for wanted, asked in ((options.export_scheme == "rd", "EXPORT_SCHEME=rd"),
                          (options.export_allocate == "hessian", "EXPORT_ALLOCATE=hessian")):
        if wanted and not args.calibration_tokens:
            raise ValueError(f"{asked} needs calibration statistics: give --calibration-tokens N, --data DIR and"
                             " --tokenizer MODEL")
    if args.calibration_tokens:
        if not (args.data and args.tokenizer):
            raise ValueError("--calibration-tokens needs --data DIR and --tokenizer MODEL")
        statistics = calibrate_state(state, meta, data=args.data, tokenizer=args.tokenizer, device=args.device,
                                     tokens=args.calibration_tokens)
    sensitivity = read_sensitivity(args.sensitivity_map, shapes_of(state)) if args.sensitivity_map else None
    return {"statistics": statistics, "sensitivity": sensitivity, "code_bytes": train_gpt.code_bytes(options)}


def named_values(knobs: Iterable[str]) -> dict[str, str]:
    if malformed := [knob for knob in knobs if "=" not in knob]:
        raise ValueError(f"a knob must be NAME=VALUE, got {', '.join(malformed)}")
    return dict(knob.split("=", 1) for knob in knobs)


def read_with_meta(path: str, knobs: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, meta) of an artifact or of any checkpoint; `knobs` (NAME=VALUE) complete one that comes without meta."""
    return read_with_plan(path, knobs)[:2]


def read_with_plan(path: str, knobs: list[str]) -> tuple[dict[str, Tensor], dict[str, Any], tuple[PlanRow, ...]]:
    """The same and the plan, which is empty for a checkpoint."""
    values, plan = named_values(knobs), ()
    with open(path, "rb") as file:
        is_artifact = file.read(len(MAGIC)) == MAGIC
    if is_artifact:
        artifact = load_artifact(path)
        state, meta, plan = artifact.state, artifact.meta, artifact.plan
    else:
        state, meta = read_checkpoint(path)
    if meta is None:
        return state, meta_from_state(state, values), plan
    if knobs:
        raise ValueError(f"{path} carries its configuration, which --knob {', '.join(knobs)} cannot change")
    return state, meta, plan


def scheme_of(plan: Iterable[PlanRow]) -> str:
    """What the lines of the score call a file; a checkpoint counts as int8, whose lines the challenge reads."""
    return "rd" if any(row.codec == "grid" for row in plan) else "int8_zlib"


def inspect_verb(args: argparse.Namespace) -> int:
    artifact = load_artifact(args.file)
    total = sum(artifact.parts.values())
    if args.json:
        plan = [asdict(row) for row in artifact.plan]
        print(json.dumps({"meta": artifact.meta, "plan": plan, "parts": artifact.parts, "total_bytes": total}, indent=1))
        return 0
    print(f"meta: {json.dumps(artifact.meta)}\n")
    print(*plan_lines(Stored(row, artifact.values[row.name]) for row in artifact.plan), sep="\n")
    print(f"\n{'bytes':>11} {'share':>7}  part")
    for part, size in (*artifact.parts.items(), ("total", total)):
        print(f"{size:11} {size / total:7.2%}  {part}")
    return 0


def eval_verb(args: argparse.Namespace) -> int:
    state, meta, plan = read_with_plan(args.file, args.knob)
    given = {name: getattr(args, name.lower()) for name in NAMED["eval"]}
    modes = mode_knobs({name: value for name, value in given.items() if value is not None}, meta)
    result = evaluate_artifact(state, meta, data=args.data, tokenizer=args.tokenizer, device=args.device,
                               max_tokens=args.max_tokens, batch_tokens=args.batch_tokens)
    name = f"final_{scheme_of(plan)}_roundtrip"
    print(f"{name} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} eval_time:{1000 * result.seconds:.0f}ms")
    print(f"{name}_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")
    if modes is not None:
        score_modes(state, meta, modes, scheme_of(plan), data=args.data, tokenizer=args.tokenizer, device=args.device,
                    max_tokens=args.max_tokens, kept=args.sections)
    return 0


def verify_verb(args: argparse.Namespace) -> int:
    """Export the checkpoint again by the options in the file: each tensor must come out bit for bit as in the file."""
    artifact, (state, meta) = load_artifact(args.file), read_with_meta(args.checkpoint, args.knob)
    asked = artifact.meta.get("export", {})
    kinds = {f.name: (int, float) if isinstance(f.default, float) else type(f.default) for f in fields(ExportOptions)}
    unknown = [k for k, v in asked.items() if not isinstance(v, kinds.get(k, ()))] if isinstance(asked, dict) else [asked]
    require(not unknown, "meta.export", None, sorted(unknown), "options of this version")
    options = ExportOptions(**asked)
    again = encode_artifact(state, artifact.meta, options, **given_for(args, state, meta, options))
    names, differing = sorted(again.state.keys() | artifact.state.keys()), 0
    for name in names:
        verdict, note = "differs", f"only in the {'file' if name in artifact.state else 'checkpoint'}"
        if name in again.state and name in artifact.state:
            decoded, original, stored = artifact.state[name], again.state[name], again.tensors[name]
            note = f"{decoded.dtype} {tuple(decoded.shape)}, in the checkpoint {original.dtype} {tuple(original.shape)}"
            if (decoded.shape, decoded.dtype) == (original.shape, original.dtype):
                verdict = "equal" if same_bits(decoded, restore(stored.row, stored.values)) else "differs"
                error = original.double() - decoded.double()
                rms_error = math.sqrt(sum_squares(error) / max(sum_squares(original), 1e-300))
                note = f"rms_error:{rms_error:.6f} max_error:{float(error.abs().max()):.3g}"
        differing += verdict == "differs"
        print(f"{verdict:7} {ascii(name)[1:-1]} {note}")
    print(f"tensors:{len(names)} differing:{differing}")
    return 1 if differing else 0


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def extract_verb(args: argparse.Namespace) -> int:
    """Dequantise one tensor (printed, or as the only one of a safetensors file), or all of them."""
    artifact = load_artifact(args.file)
    if args.tensor is None and args.to is None:
        raise ValueError(f"name a tensor or give --to FILE.safetensors; the file holds {', '.join(sorted(artifact.state))}")
    if args.tensor is not None and args.tensor not in artifact.state:
        raise ValueError(f"{args.file} holds no tensor {args.tensor!a}, but {', '.join(sorted(artifact.state))}")
    chosen = {name: t.contiguous() for name, t in artifact.state.items() if args.tensor in (None, name)}
    if args.to is None:
        for name, w in chosen.items():
            print(f"{name} {dtype_name(w)} {tuple(w.shape)} rms:{w.double().square().mean().sqrt():.6g}\n{w}")
        return 0
    from safetensors.torch import save

    write_atomically(Path(args.to), save(chosen, {"artifact_meta": pack_meta(artifact.meta).decode("ascii")}))
    print(f"wrote:{args.to} tensors:{len(chosen)} bytes:{Path(args.to).stat().st_size}")
    return 0


def predict_verb(args: argparse.Namespace) -> int:
    """The total for the knobs in the environment and on the command line; exit code 2 where a run would refuse to start."""
    cfg, problems = Config.parse({**os.environ, **named_values(args.knob)})
    if problems:
        raise ValueError("; ".join(problems))
    line, refused = train_gpt.predicted_size(cfg)
    print(line)
    return 2 if refused else 0


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "predict": ("the size of a run's artifact before there is one", predict_verb),
    "write": ("quantise and compress a checkpoint", write_verb),
    "inspect": ("print the plan and the bytes of every part", inspect_verb),
    "eval": ("validate the model in an artifact or a checkpoint", eval_verb),
    "extract": ("dequantise one tensor, or all into a safetensors file", extract_verb),
    "verify": ("export the checkpoint again and compare, tensor by tensor", verify_verb),
}


def as_bool(text: str) -> bool:
    return bool(("0", "1").index(text))     # a ValueError otherwise, which argparse reports in one line


def command_line() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="export.py", description="Tensors to bytes and back.")
    added = parser.add_subparsers(dest="verb", required=True)
    verbs = {name: added.add_parser(name, help=text) for name, (text, _) in VERBS.items()}
    verbs["write"].add_argument("checkpoint")
    verbs["write"].add_argument("-o", "--output", required=True)
    for name in ("inspect", "eval", "extract", "verify"):
        verbs[name].add_argument("file")
    verbs["verify"].add_argument("checkpoint")
    verbs["inspect"].add_argument("--json", action="store_true")
    verbs["extract"].add_argument("tensor", nargs="?")
    verbs["extract"].add_argument("--to", metavar="FILE.safetensors")
    verbs["predict"].add_argument("knob", nargs="*", metavar="NAME=VALUE", help="as in the environment, and before it")
    verbs["eval"].add_argument("--max-tokens", type=int, default=0, help="0 = the whole validation split")
    verbs["eval"].add_argument("--batch-tokens", type=int, default=65_536)
    verbs["eval"].add_argument("--sections", type=output_path, metavar="FOLDER",
                               help="keeps what EVAL_STRIDE has scored until all is; a repeated call goes on behind it")
    for f in fields(Config):
        if f.name in train_gpt.MODES:
            verbs["eval"].add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"].replace("%", "%%"))
    for f in fields(ExportOptions):
        flag = "--" + f.name.replace("_", "-")
        kind, text = type(f.default), f.metadata["help"].replace("%", "%%")
        verbs["write"].add_argument(flag, type=as_bool if kind is bool else kind, default=f.default, help=text)
    for name in ("write", "verify"):
        verbs[name].add_argument("--calibration-tokens", type=int, default=0, help="training tokens of --data to learn from")
        verbs[name].add_argument("--sensitivity-map", metavar="FILE", help="of scripts/sensitivity.py")
    for name in ("write", "verify", "eval"):
        verbs[name].add_argument("--data", required=name == "eval", metavar="DIR")
        verbs[name].add_argument("--tokenizer", required=name == "eval", metavar="MODEL")
        verbs[name].add_argument("--device", default="auto")
        verbs[name].add_argument("--knob", action="append", default=[], metavar="NAME=VALUE", help="where meta is missing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; every fault of the input becomes one line and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    args = command_line().parse_args(as_flags(arguments))
    try:
        return VERBS[args.verb][1](args)
    except (ValueError, OSError) as fault:
        print(f"export.py {args.verb}: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2


