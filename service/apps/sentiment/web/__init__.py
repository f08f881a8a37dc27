"""The sentiment app's page: an ASGI app, the files it serves, and the process that runs both.

`app` has the routes, `guards` what every request passes, `limits` how much one client may ask for,
`bodies` reads what is posted, `tables` reads CSV files, `batches` classifies their rows, `events`
turns answers and errors into what the page shows, `source` is where answers come from (a GPTJet
server, through its client), `model_server` a server of the page's own, `run` the process.
"""
