"""A checkpoint of random weights in the shape of facebook/opt-125m. usage: make_model.py OUT_DIR"""
import json
import sys

import torch
from tokenizers import Tokenizer, models
from transformers import OPTConfig, OPTForCausalLM

out = sys.argv[1]
torch.manual_seed(0)
OPTForCausalLM(OPTConfig()).save_pretrained(out)
# CTranslate2's converter wants a vocabulary, whatever its words.
words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"t{i}": i for i in range(4, 50265)}
Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>")).save(f"{out}/tokenizer.json")
special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
with open(f"{out}/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast"} | special, file)
