"""What encoding on load costs, and loading a saved file: peak memory, total time, and time to the first token.

    python tests/benchmarks/memory.py [--layers 30] [--encoding q4_k] [--folder FOLDER]

Writes a Mistral checkpoint of random bfloat16 weights (30 layers: 1.5 billion parameters, 3 GB) into the folder,
exports it, and runs it from the exported file. Each step is a process of its own, measured by the operating system.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1536, 8960, 12, 2, 128, 32768
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--encoding", default="q4_k")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    if not (folder / "config.json").exists():
        write_checkpoint(folder, options.layers)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    saved = folder / f"model.{options.encoding}"
    pixtral = [sys.executable, "-m", "pixtral_cli"]
    seconds, peak = measured([*pixtral, "export", str(folder), str(saved), "--quantization-encoding", options.encoding])
    size = saved.stat().st_size
    print(f"checkpoint {stored / MIB:.0f} MiB, {options.encoding} {size / MIB:.0f} MiB")
    print(f"export: {seconds:.1f} s, {stored / seconds / 1e6:.0f} MB/s, peak memory {peak / MIB:.0f} MiB")
    torch_s = min(measured([sys.executable, "-c", "import torch"])[0] for _ in range(3))
    ask = [*pixtral, "run", "--serialized-model-path", str(saved), "-p", "Hi", "--max-new-tokens", "1", "--ignore-eos"]
    measured(ask)  # the page cache is warm from here on
    seconds, peak = min(measured(ask) for _ in range(3))
    print(f"first token: {seconds - torch_s:.2f} s beyond import torch ({torch_s:.2f} s), whole process")
    print(f"resident memory of that run: {peak / MIB:.0f} MiB = file x {peak / size:.2f}")


def measured(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command, run to its end."""
    code = (
        "import resource, subprocess, sys, time; begun = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True).stdout
    seconds, peak = out.split()
    return float(seconds), int(peak)


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights in Hugging Face form, a shard per layer, with the built-in model's tokenizer."""
    import shutil

    import torch
    from safetensors.torch import save_file

    from pixtral_cli.tiny import FOLDER

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FOLDER / name, folder)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).bfloat16()

    index = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    norm = torch.ones(HIDDEN).bfloat16()
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shard(
            layer,
            {
                prefix + "input_layernorm.weight": norm.clone(),
                prefix + "post_attention_layernorm.weight": norm.clone(),
                prefix + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
                prefix + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
                prefix + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
                prefix + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
                prefix + "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
                prefix + "mlp.up_proj.weight": matrix(FFN, HIDDEN),
                prefix + "mlp.down_proj.weight": matrix(HIDDEN, FFN),
            },
        )
    ends = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": norm,
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    shard(layers, ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
