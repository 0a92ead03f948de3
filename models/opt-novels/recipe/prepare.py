"""train.jsonl and held-out.jsonl, one document a line, from folders of texts. usage: prepare.py TEXT_DIR OUT_DIR"""
import glob, json, re, sys

text, out = sys.argv[1:]
HELD_OUT = ("Doyle_Hound", "Forster_Angels", "Burnett_Garden")
novels = sorted(glob.glob(f"{text}/100_english_novels/*.txt"))
held = [f for f in novels if any(k in f for k in HELD_OUT)]
train = [f for f in novels if f not in held]
train += sorted(glob.glob(f"{text}/gutenberg/*.txt")) + sorted(glob.glob(f"{text}/tinystories/*.txt"))


def documents(path):
    s = open(path, encoding="utf-8", errors="ignore").read()
    if "tinystories" in path:
        docs = s.split("<|endoftext|>")  # each story is a document
    else:
        docs = [re.sub(r"(?<!\n)\n(?!\n)", " ", s.replace("\r", ""))]  # single line breaks are only wrapping
    return filter(None, (d.strip() for d in docs))


for name, files in (("train", train), ("held-out", held)):
    with open(f"{out}/{name}.jsonl", "w", encoding="utf-8") as lines:
        for document in (d for f in files for d in documents(f)):
            lines.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
