'use strict';
// The course that every driver of node runs. What it does and says: README.md one directory up.

const fs = require('fs');
const path = require('path');

const ROUNDS_MAX = 2000;
const EPOCH = Date.UTC(2026, 0, 1);
const MOODS = ['ok', 'so, so', "it's {bad}"];

const tell = (line) => process.stdout.write(JSON.stringify(line) + '\n');

const text = (error) => `${error.name}: ${error.message}`.replaceAll('\n', ' ');

function order(client, n) {
  return {
    client,
    n,
    aid: 1 + ((client * 31 + n) % 1000),
    delta: (n % 7) - 3,
    body: Buffer.from(Array.from({ length: 300 }, (_, place) => (place + n) % 256)),
    sent: new Date(EPOCH + n),
    mood: MOODS[n % 3],
  };
}

function check(what, found, wanted) {
  const [is, should] = [found, wanted].map((value) => JSON.stringify(value));
  if (is !== should) throw new Error(`${what}: ${is}, wanted ${should}`);
}

async function afterwards(driver, one, pooling, types, done) {
  const { body, sent } = await driver.parcel(one);
  check('body', body.toString('hex'), one.body.toString('hex'));
  check('sent', sent.getTime(), one.sent.getTime());
  if (one.n % 3 === 0) {
    check('collision', await driver.collide(one, one.n % 2 === 0), '23505');
    done.refused += 1;
  }
  if (pooling === 'session') {
    check('work_mem', await driver.setting(), '7MB');
    check('notification', await driver.echo(one), String(one.n));
  }
  if (types === '1') {
    check('feeling', await driver.feel(one), [one.mood, [one.mood, 'ok'], ['street', one.mood]]);
  }
}

// Packages do not always let their package.json be required.
function version(name) {
  const places = require.resolve.paths(name).map((place) => path.join(place, name, 'package.json'));
  return JSON.parse(fs.readFileSync(places.find((place) => fs.existsSync(place)))).version;
}

// Runs the course over `connect(mode, client)`, which gives an object with the methods used here.
async function run(connect, name) {
  const [mode, client, pooling, types, pace] = process.argv.slice(2);
  const stop = new AbortController();
  for (const event of ['data', 'end']) process.stdin.on(event, () => stop.abort());
  const done = { rounds: 0, refused: 0 };
  let driver;
  tell({ version: version(name) });
  try {
    driver = await connect(mode, Number(client), pooling);
    driver.failed = new Promise((_, reject) => driver.onerror(reject));
    driver.failed.catch((error) => { tell({ error: `connection: ${text(error)}` }); stop.abort(); });
    if (pooling === 'session') await driver.beginSession();
    if (types === '1') await driver.learnTypes();
  } catch (error) {
    tell({ error: `connecting: ${text(error)}` });
    stop.abort();
  }
  for (let n = 1; n <= ROUNDS_MAX && !stop.signal.aborted; n += 1) {
    const one = order(Number(client), n);
    try {
      await driver.transfer(one);
    } catch (error) {
      tell({ unknown: n, error: `transfer: ${text(error)}` });
      break;
    }
    tell({ acknowledged: n });
    try {
      await afterwards(driver, one, pooling, types, done);
    } catch (error) {
      tell({ error: `round ${n}: ${text(error)}` });
      break;
    }
    done.rounds = n;
    await new Promise((resolve) => setTimeout(resolve, Number(pace)));
  }
  // Nothing else may keep the program alive, and what was said has to be out first.
  process.stdout.write(JSON.stringify({ done }) + '\n', () => process.exit(0));
}

module.exports = { run };
