// The email worker that a booking system written for Node would have: jobs from a quorum queue, sent through nodemailer's
// pool, acknowledged once the server has accepted them.
// Guarantee: a job is acknowledged only after its message was accepted; one that failed goes back to the queue.
'use strict';

const amqp = require('amqplib');
const nodemailer = require('nodemailer');

const { AMQP_URL, QUEUE, SMTP_HOST, SMTP_PORT, SMTP_USERNAME, SMTP_PASSWORD, CONNECTIONS, PREFETCH } = process.env;
const FROM = 'Acme Bookings <bookings@acme.example>';

const transport = nodemailer.createTransport({
  pool: true,
  host: SMTP_HOST,
  port: Number(SMTP_PORT),
  secure: false,
  auth: { user: SMTP_USERNAME, pass: SMTP_PASSWORD },
  maxConnections: Number(CONNECTIONS),
  maxMessages: Infinity,
});

function mailOf(job) {
  const mail = { from: FROM, to: job.to, subject: job.subject, text: job.text, html: job.html };
  if (job.calendar) mail.icalEvent = { method: job.calendar.method, content: job.calendar.content };
  return mail;
}

async function main() {
  const connection = await amqp.connect(AMQP_URL);
  const channel = await connection.createChannel();
  await channel.assertQueue(QUEUE, { durable: true, arguments: { 'x-queue-type': 'quorum' } });
  await channel.prefetch(Number(PREFETCH));
  await channel.consume(QUEUE, async (message) => {
    if (message === null) throw new Error('the broker has cancelled the consumer');
    try {
      await transport.sendMail(mailOf(JSON.parse(message.content)));
      channel.ack(message);
    } catch (error) {
      console.error(error);
      channel.nack(message);
    }
  });
  process.once('SIGTERM', async () => {
    transport.close();
    await connection.close();
  });
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
