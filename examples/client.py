"""A conversation with a server, streamed through OpenAI's client.

hanok serve --port 8080 &
python examples/client.py [URL]
"""

import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none needed")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Tell me a story about a cat."}],
    max_tokens=48,
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
