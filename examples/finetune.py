"""Fine-tunes a model with the command line, from rows of text to a server: every verb on the way.

python examples/finetune.py [CHECKPOINT]
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import hanok

path = sys.argv[1] if len(sys.argv) > 1 else str(hanok.BUNDLED)
ANSWERS = {
    "What did Lily see?": "Lily saw a small green frog.",
    "Where did Tom go?": "Tom went to the big lake.",
    "Who was sad?": "The little bear was sad.",
    "What did Ben eat?": "Ben ate a red apple.",
}


def run(line: str) -> None:
    """Show what is run, and run it."""
    print(f"$ hanok {line}", flush=True)
    subprocess.run([sys.executable, "-m", "hanok", *shlex.split(line)], check=True)


with tempfile.TemporaryDirectory() as folder:
    rows, output, merged = (f"{folder}/{name}" for name in ("rows.jsonl", "run", "merged"))
    with Path(rows).open("w") as file:
        for question, answer in list(ANSWERS.items()) * 8:
            turns = {"user": question, "assistant": answer}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            file.write(json.dumps({"messages": messages}) + "\n")

    run(f"train preview {rows} --model {path} --rows 1")
    run(f"plan {path} --train --lora r=8 --pack-tokens 128")
    run(
        f"train {path} {rows} --output {output} --lora r=8 --pack-tokens 128 --packs-per-step 2 "
        "--epochs 10 --learning-rate 0.003 --held-out 0.1"
    )
    run(f"generate {path} 'What did Lily see?' --adapter {output}/adapter --max-new-tokens 16")
    run(f"merge {path} {output}/adapter {merged}")

    command = [sys.executable, "-m", "hanok", "serve", merged, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        words = (word for line in server.stdout or () for word in line.split())
        url = next(word for word in words if word.startswith("http://"))
        body = {"messages": [{"role": "user", "content": "Who was sad?"}], "temperature": 0}
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), kind
        )
        for _ in range(100):
            try:
                with urllib.request.urlopen(request, timeout=60) as found:
                    print("Served:", json.load(found)["choices"][0]["message"]["content"])
                break
            except urllib.error.HTTPError:  # it is loading
                time.sleep(0.1)
        server.terminate()
