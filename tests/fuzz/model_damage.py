"""What is done to a model's folder, by chance or on purpose.

Each function changes the folder that it is given and returns what it did.
"""

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.mutate import ODD_NUMBERS, ODD_TEXTS, brief, changed, damaged, odd_value

# With the ChatML of the tiny tokenizer as its base: what a template can do to its reader.
TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 10**7 }}",
    "{% set x = 9**9**9 %}",
    "{{ 'a'.center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ self.body() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary') }}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception('\x1b[31mred') }}",
    "{{ raise_exception('a' * 100000) }}",
    "{{ raise_exception('one\ntwo') }}",
    "{{ raise_exception(messages) }}",
    "{{ 1 / 0 }}",
    "{{ nope.nope.nope }}",
    "{{ messages[99].content }}",
    "{% for m in messages %}{{ m.content }}",
    "{{ }}",
    "{% nope %}",
    "{{ 'x' }",
    "",
    " ",
    "constant",
    "{{ messages }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}",
    "{% for m in messages | reverse %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|upper }}<|im_end|>{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content * 2 }}<|im_end|>{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{% do messages.append(messages[0]) %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ range(9) | random }}<|im_end|>{% endfor %}",
    "{{ strftime_now('%' * 100000) }}",
    "{{ strftime_now('%s %n') }}",
    "{{ messages | tojson(indent=10**8) }}",
    "{{ messages | map('upper') | list }}",
    "{{ dict(a=1).update(b=2) }}{{ namespace(x=1).x }}",
    "{" * 5000,
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    "\x00",
)  # fmt: skip
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim", "rms_norm_eps",
         "initializer_range", "rope_theta", "rope_parameters", "rope_scaling",
         "tie_word_embeddings",
         "hidden_act", "model_type", "architectures", "dtype", "torch_dtype", "sliding_window",
         "layer_types", "use_sliding_window", "attention_bias", "attention_dropout", "eos_token_id",
         "bos_token_id", "pad_token_id", "quantization_config", "auto_map", "transformers_version",
         "partial_rotary_factor", "mlp_bias", "use_cache", "max_window_layers",
         "id2label")  # fmt: skip


def config(rng: random.Random, folder: Path, _home: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    what = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.75:
            key = rng.choice(SIZES)
            values = (
                *ODD_NUMBERS,
                odd_value(rng),
                odd_value(rng),
                2**20,
                2**40,
                3,
                5,
                64,
                100_000,
                "x",
            )
            config[key] = rng.choice(values)
            if key in ("rope_parameters", "rope_scaling") and rng.random() < 0.8:
                config[key] = _rope(rng)
            what.append(f"{key} = {brief(config[key])}")
        else:
            config, change = changed(rng, config)
            what.append(change)
        if not isinstance(config, dict):
            break
    path.write_text(_as_json(config))
    return f"config.json: {'; '.join(what)}"


def _rope(rng: random.Random) -> Any:
    kinds = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "nope", None, 5)
    rope: dict[str, Any] = {
        "rope_type": rng.choice(kinds),
        "rope_theta": rng.choice((1e4, *ODD_NUMBERS, "x")),
    }
    for key in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        if rng.random() < 0.7:
            rope[key] = rng.choice((8.0, 1.0, 4.0, 32, *ODD_NUMBERS, "x", None))
    return rope


def tokenizer(rng: random.Random, folder: Path, _home: Path) -> str:
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json",
                       "special_tokens_map.json",
                       "added_tokens.json", "generation_config.json"))  # fmt: skip
    path = folder / name
    if rng.random() < 0.2:
        text = rng.choice(
            ("null", "[]", "{}", '"x"', "5", "", "[" * 100_000, '{"a":' * 100_000, "\x00")
        )
        path.write_text(text)
        return f"{name}: {text[:20]!r}"
    content = json.loads(path.read_text()) if path.exists() else {}
    if name == "tokenizer.json" and rng.random() < 0.4:
        what = _vocabulary(rng, content)
    elif name == "tokenizer_config.json" and rng.random() < 0.6:
        key = rng.choice(("eos_token", "bos_token", "pad_token", "unk_token", "chat_template",
                          "model_max_length",
                          "tokenizer_class", "add_bos_token", "extra_special_tokens", "auto_map",
                          "added_tokens_decoder", "additional_special_tokens",
                          "padding_side"))  # fmt: skip
        values = (odd_value(rng), odd_value(rng), "<|im_start|>", "nope", "LlamaTokenizer",
                  "BertTokenizer",
                  {"content": "x"}, [{"name": "default", "template": "x"}])  # fmt: skip
        content[key] = rng.choice(values)
        what = f"{key} = {brief(content[key])}"
    else:
        content, what = changed(rng, content)
    path.write_text(_as_json(content))
    return f"{name}: {what}"


def _vocabulary(rng: random.Random, content: dict[str, Any]) -> str:
    """Ids that are out of place."""
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    kind = rng.choice(
        ("beyond", "double", "negative", "added beyond", "added twice", "gone", "merges")
    )
    token = rng.choice(list(vocabulary))
    if kind in ("beyond", "negative", "double"):
        vocabulary[token] = {
            "beyond": rng.choice((403, 900, 2**31, 2**32)),
            "negative": -1,
            "double": 5,
        }[kind]
    elif kind == "added beyond":
        added[rng.randrange(len(added))]["id"] = rng.choice((900, 2**31, -1))
    elif kind == "added twice":
        added.append(dict(added[0], content=rng.choice(ODD_TEXTS[:-2]), id=rng.choice((1, 2, 410))))
    elif kind == "gone":
        del vocabulary[token]
    else:
        content["model"]["merges"] = rng.choice(
            ([], [["a", "b"]], [["a"]], ["a"], None, [[token, token]])
        )
    return f"{kind} {token!r}"


def template(rng: random.Random, folder: Path, _home: Path) -> str:
    text = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        text = (folder / "chat_template.jinja").read_text() + text
    elif rng.random() < 0.2:
        data, _ = damaged(rng, (folder / "chat_template.jinja").read_bytes())
        (folder / "chat_template.jinja").write_bytes(data)
        return f"template: {data[:200]!r}"
    (folder / "chat_template.jinja").write_text(text)
    return f"template: {text[-120:]!r}"


def weights(rng: random.Random, folder: Path, _home: Path) -> str:
    path = folder / "model.safetensors"
    kind = rng.choice(("bytes", "header", "header", "nan", "dtype", "shape", "extra", "lacks"))
    data = path.read_bytes()
    if kind == "bytes":
        data, how = damaged(rng, data)
        path.write_bytes(data)
        return f"model.safetensors: {how}"
    if kind == "header":
        size = int.from_bytes(data[:8], "little")
        header, how = changed(rng, json.loads(data[8 : 8 + size]))
        text = _as_json(header).encode()
        length = rng.choice((len(text), len(text), len(text), 0, 2**63, 2**32, len(text) + 1))
        path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
        return f"header of model.safetensors: {how}"
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    if kind == "nan":
        tensors[name].view(-1)[0] = rng.choice((math.nan, math.inf, -math.inf))
    elif kind == "dtype":
        tensors[name] = tensors[name].to(
            rng.choice((torch.int64, torch.float64, torch.float16, torch.bool))
        )
    elif kind == "shape":
        tensors[name] = tensors[name][..., :-1].contiguous()
    elif kind == "extra":
        tensors[rng.choice(("x", "model.layers.9.mlp.up_proj.weight", "\x1b[31m"))] = torch.zeros(2)
    else:
        del tensors[name]
    save_file(tensors, path)
    return f"{name}: {kind}"


def index(rng: random.Random, folder: Path, home: Path) -> str:
    """Shards with an index that is not what it should."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.rename(folder / "model-00001-of-00001.safetensors")
    index: Any = {
        "metadata": {},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }
    name = rng.choice(list(tensors))
    kind = rng.choice(("outside", "changed", "changed", "bytes", "link", "text"))
    if kind == "outside":
        shutil.copy(home / "qwen2-tied" / "model.safetensors", "outside.safetensors")
        places = ("../outside.safetensors", str(Path("outside.safetensors").resolve()),
                  "/etc/passwd", "..", "",
                  ".", "\x00", "a" * 300, "\x1b[31m")  # fmt: skip
        index["weight_map"][name] = rng.choice(places)
    elif kind == "changed":
        index, name = changed(rng, index)
    elif kind == "link":
        shard = folder / "model-00001-of-00001.safetensors"
        shutil.move(shard, "elsewhere")
        shard.symlink_to(
            rng.choice((str(Path("elsewhere").resolve()), "/dev/zero", shard.name, "/"))
        )
    text = _as_json(index)
    if kind == "text":
        text = rng.choice(
            ("null", "[]", "", "5", "[" * 100_000, '{"weight_map": null}', '{"weight_map": []}')
        )
    (folder / "model.safetensors.index.json").write_text(text)
    if kind == "bytes":
        data, how = damaged(rng, text.encode())
        (folder / "model.safetensors.index.json").write_bytes(data)
        name = how
    return f"index: {kind} {name!r:.80}"


def any_file(rng: random.Random, folder: Path, _home: Path) -> str:
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.2:
        path.unlink()
        return f"{path.name} is gone"
    data, how = damaged(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {how}"


def strange(rng: random.Random, folder: Path, home: Path) -> str:
    """Code, links and pickles."""
    kind = rng.choice(("code", "pickle", "pipe", "folder", "loop", "many", "only pickle"))
    path = rng.choice(sorted(folder.iterdir()))
    if kind == "code":
        (folder / "evil.py").write_text("open('canary', 'w').write('x')\n")
        path = folder / rng.choice(("config.json", "tokenizer_config.json"))
        content = json.loads(path.read_text())
        content["auto_map"] = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]}
        if rng.random() < 0.5:
            content["model_type"] = "evil"
        path.write_text(json.dumps(content))
    elif kind == "many":
        (folder / "deep").mkdir()
        (folder / "deep" / "x.json").write_text("{}")
    elif kind.endswith("pickle"):
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
        if kind.startswith("only"):
            (folder / "model.safetensors").unlink()
    else:
        path.unlink()
        {
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "loop": lambda: path.symlink_to(path.name),
        }[kind]()
    return f"{kind} {path.name}"


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000
