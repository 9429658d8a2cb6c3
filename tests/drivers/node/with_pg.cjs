'use strict';
// node-postgres. Modes: plain (unnamed statements), named (prepared once by name).

const { Client } = require('pg');
const course = require('./course.cjs');

class Driver {
  constructor(client, mode, number) {
    Object.assign(this, { client, mode, channel: `echo_${number}`, heard: [] });
    client.on('notification', (message) => this.heard.push(message.payload));
  }

  onerror(callback) {
    this.client.on('error', callback);
  }

  run(name, text, values) {
    return this.client.query(this.mode === 'named' ? { name, text, values } : { text, values });
  }

  async transfer({ client, n, aid, delta, body, sent }) {
    await this.client.query('BEGIN');
    await this.run('ledger', 'INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4)', [client, n, aid, delta]);
    await this.run('account', 'UPDATE accounts SET abalance = abalance + $1 WHERE aid = $2', [delta, aid]);
    await this.send({ client, n, body, sent });
    await this.client.query('COMMIT');
  }

  send({ client, n, body, sent }) {
    return this.run('parcel', 'INSERT INTO parcel (client, n, body, sent) VALUES ($1, $2, $3, $4)', [client, n, body, sent]);
  }

  async parcel({ client, n }) {
    const found = await this.run('look', 'SELECT body, sent FROM parcel WHERE client = $1 AND n = $2', [client, n]);
    return found.rows[0];
  }

  async collide(order, inTransaction) {
    try {
      if (inTransaction) await this.client.query('BEGIN');
      await this.send(order);
      return 'nothing';
    } catch (error) {
      return error.code;
    } finally {
      if (inTransaction) await this.client.query('ROLLBACK');
    }
  }

  async beginSession() {
    await this.client.query(`SET work_mem = '7MB'; LISTEN ${this.channel}`);
  }

  async setting() {
    return (await this.client.query('SHOW work_mem')).rows[0].work_mem;
  }

  async echo({ n }) {
    this.heard = [];
    await this.run('echo', 'SELECT pg_notify($1, $2)', [this.channel, String(n)]);
    return this.heard[0];
  }

  // Types of one's own are text to it.
  async learnTypes() {}

  async feel({ client, n, mood }) {
    const quoted = JSON.stringify(mood);
    const values = [client, n, mood, [mood, 'ok'], `(street,${quoted})`];
    await this.run('feel', 'INSERT INTO feeling (client, n, mood, moods, spot) VALUES ($1, $2, $3, $4, $5)', values);
    const sql = 'SELECT mood, moods::text[], ARRAY[(spot).street, (spot).mood::text] AS spot FROM feeling WHERE client = $1 AND n = $2';
    const row = (await this.run('felt', sql, [client, n])).rows[0];
    return [row.mood, row.moods, row.spot];
  }
}

course.run(async (mode, number) => {
  const client = new Client();
  await client.connect();
  return new Driver(client, mode, number);
}, 'pg');
