"""Makes train.jsonl: the first problems of GSM8K as chats, without the calls to a calculator.

python experiments/gsm8k/make_sample.py        (from JLORA_DATA, by default ../shared/data beside the repository)
"""

import json
import os
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS = 400


def main() -> None:
    """Write train.jsonl beside this file."""
    data = Path(os.environ.get("JLORA_DATA", HERE.parents[2] / "shared" / "data"))
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    with open(HERE / "train.jsonl", "w", encoding="utf-8") as file:
        for row in map(json.loads, lines):
            answer = re.sub(r"<<[^>]*>>", "", row["answer"])
            messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
