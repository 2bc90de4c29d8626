"""A tool call: the model names a function and its arguments, the client runs it and sends the result.

hanok serve --port 8080 &
python examples/tools.py [URL]
"""

import json
import sys

import openai

SHELF = {"red": 3, "blue": 5}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "count_toys",
            "description": "Count the toys of a color.",
            "parameters": {
                "type": "object",
                "properties": {"color": {"enum": sorted(SHELF)}},
                "required": ["color"],
            },
        },
    }
]

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none needed")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "How many red toys are there?"}]

# "required" constrains the answer to a call; with "auto" the model decides.
answer = client.chat.completions.create(
    model=model,
    messages=messages,
    tools=TOOLS,
    tool_choice="required",
    max_tokens=64,
    temperature=0,
)
(call,) = answer.choices[0].message.tool_calls
arguments = json.loads(call.function.arguments)
count = SHELF[arguments["color"]]
print(f"{call.function.name}({arguments}) -> {count}")

messages += [
    answer.choices[0].message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"count": count})},
]
answer = client.chat.completions.create(
    model=model, messages=messages, max_tokens=32, temperature=0
)
print(answer.choices[0].message.content)
