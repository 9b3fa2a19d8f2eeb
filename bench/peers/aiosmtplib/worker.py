"""The email worker that a booking system written for Python would have: jobs from a quorum queue through aio-pika, sent
over kept connections of aiosmtplib, acknowledged once the server has accepted them.

Guarantee: a job is acknowledged only after its message was accepted; one that failed goes back to the queue.
"""

import asyncio
import json
import os
import signal
import sys
import traceback
from contextlib import asynccontextmanager
from email.message import EmailMessage
from email.utils import formatdate, make_msgid

import aio_pika
import aiosmtplib

FROM = "Acme Bookings <bookings@acme.example>"
DOMAIN = "acme.example"


class Pool:
    """aiosmtplib has none: connections are opened when they are first needed, and kept. A doubtful one is closed."""

    def __init__(self, size):
        self._idle = asyncio.LifoQueue()
        for _ in range(size):
            self._idle.put_nowait(None)

    @asynccontextmanager
    async def connection(self):
        client = await self._idle.get()
        try:
            if client is None or not client.is_connected:
                client = aiosmtplib.SMTP(
                    hostname=os.environ["SMTP_HOST"],
                    port=int(os.environ["SMTP_PORT"]),
                    username=os.environ.get("SMTP_USERNAME"),
                    password=os.environ.get("SMTP_PASSWORD"),
                )
                await client.connect()
            yield client
        except BaseException:
            if client is not None:
                client.close()
            client = None
            raise
        finally:
            self._idle.put_nowait(client)


def message_of(job):
    message = EmailMessage()
    message["From"] = FROM
    message["To"] = ", ".join(job["to"])
    message["Subject"] = job["subject"]
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=DOMAIN)
    message.set_content(job["text"])
    message.add_alternative(job["html"], subtype="html")
    calendar = job.get("calendar")
    if calendar:
        message.add_alternative(calendar["content"], subtype="calendar", params={"method": calendar["method"]})
        message.add_attachment(
            calendar["content"].encode(), maintype="application", subtype="ics", filename="invite.ics"
        )
    return message


async def main():
    pool = Pool(int(os.environ["CONNECTIONS"]))
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=int(os.environ["PREFETCH"]))
    queue = await channel.declare_queue(os.environ["QUEUE"], durable=True, arguments={"x-queue-type": "quorum"})

    async def handle(delivery):
        try:
            async with delivery.process(requeue=True):
                message = message_of(json.loads(delivery.body))
                async with pool.connection() as client:
                    await client.send_message(message)
        except Exception:
            traceback.print_exc(file=sys.stderr)

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await queue.consume(handle)
    await stop.wait()
    await connection.close()


asyncio.run(main())
