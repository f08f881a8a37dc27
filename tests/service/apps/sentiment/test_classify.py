from __future__ import annotations
import pytest
from gptjet.service.apps.sentiment.classify import SentimentClassifier
from gptjet.service.apps.sentiment.template import load_template
async def test_x(client):
    c = SentimentClassifier(client, load_template("embedded"))
    async for e in c.stream("The food was wonderful."): print(e)
    print(await c.classify("good. " * 300 + "bad. " * 200))
