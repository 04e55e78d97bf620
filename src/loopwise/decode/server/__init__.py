"""An engine behind OpenAI's HTTP interface: completions, chat, models, health and Prometheus metrics.

    service = Service(engine=Engine(model, max_requests=8, capacity=512), tokenizer=tokenizer, name="my-model")
    run_server(service, bind("127.0.0.1", 8000))

A request that cannot be served is answered with 4xx in OpenAI's error form. The engine has a thread of its own; all the
rest runs in one event loop. A client that goes away frees its slot at once. Needs `pip install "loopwise[serve]"`.
"""

from loopwise.decode.server.app import create_app as create_app
from loopwise.decode.server.front import Service as Service
from loopwise.decode.server.listen import bind as bind
from loopwise.decode.server.listen import make_server as make_server
from loopwise.decode.server.listen import run_server as run_server
