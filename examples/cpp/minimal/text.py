"""python text.py MINIMAL ENGINE PROMPT: what the program `minimal` writes, as text; it takes and prints token ids."""

import subprocess
import sys

from tokenizers import Tokenizer

minimal, engine, prompt = sys.argv[1:]
tokenizer = Tokenizer.from_file(f"{engine}/tokenizer.json")
ids = map(str, tokenizer.encode(prompt).ids)
done = subprocess.run([minimal, engine, *ids], stdout=subprocess.PIPE, text=True)
print(prompt + tokenizer.decode([int(word) for word in done.stdout.split()]))
sys.exit(done.returncode)
