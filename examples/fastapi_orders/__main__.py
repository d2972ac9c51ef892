"""Print the OpenAPI document of the orders: the aiohttp example answers the same requests.

python -m examples.fastapi_orders > examples/aiohttp_orders/openapi.json
"""

import json

from examples.fastapi_orders.app import app

print(json.dumps(app.openapi(), indent=2, ensure_ascii=False))
