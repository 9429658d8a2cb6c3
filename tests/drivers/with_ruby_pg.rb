# ruby-pg on the course; what that is and says: README.md beside this file.
# Modes: plain (exec_params), prepared (exec_prepared, binary values for bytea).

require 'json'
require 'pg'

ROUNDS_MAX = 2000
EPOCH = Time.utc(2026, 1, 1)
MOODS = ['ok', 'so, so', "it's {bad}"].freeze

Order = Struct.new(:client, :n) do
  def aid = 1 + (client * 31 + n) % 1000
  def delta = n % 7 - 3
  def body = (0...300).map { |place| (place + n) % 256 }.pack('C*')
  def sent = EPOCH + Rational(n, 1000)
  def mood = MOODS[n % 3]
end

def tell(line)
  $stdout.puts(JSON.generate(line))
  $stdout.flush
end

def text(error) = "#{error.class}: #{error.message}".tr("\n", ' ').scrub

def check(what, found, wanted)
  raise "#{what}: #{found.inspect}, wanted #{wanted.inspect}" unless found == wanted
end

class Driver
  def initialize(mode, client)
    @connection = PG.connect
    @prepared = mode == 'prepared'
    @known = {}
    @channel = "echo_#{client}"
  end

  def run(sql, values)
    return @connection.exec_params(sql, values) unless @prepared

    name = @known[sql] ||= "st#{@known.size}".tap { |fresh| @connection.prepare(fresh, sql) }
    @connection.exec_prepared(name, values)
  end

  def transfer(order)
    @connection.transaction do
      run('INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4)',
          [order.client, order.n, order.aid, order.delta])
      run('UPDATE accounts SET abalance = abalance + $1 WHERE aid = $2', [order.delta, order.aid])
      send_parcel(order)
    end
  end

  def send_parcel(order)
    body = { value: order.body, format: 1 }
    run('INSERT INTO parcel (client, n, body, sent) VALUES ($1, $2, $3, $4)',
        [order.client, order.n, body, order.sent.strftime('%F %T.%6N+00')])
  end

  def parcel(order)
    row = run('SELECT body, sent FROM parcel WHERE client = $1 AND n = $2', [order.client, order.n]).values.first
    [PG::Connection.unescape_bytea(row[0]), PG::TextDecoder::TimestampWithTimeZone.new.decode(row[1])]
  end

  def collide(order, in_transaction)
    in_transaction ? @connection.transaction { send_parcel(order) } : send_parcel(order)
    'nothing'
  rescue PG::Error => e
    e.result.error_field(PG::PG_DIAG_SQLSTATE)
  end

  def begin_session
    @connection.exec("SET work_mem = '7MB'; LISTEN #{@channel}")
  end

  def setting = @connection.exec('SHOW work_mem').getvalue(0, 0)

  def echo(order)
    run('SELECT pg_notify($1, $2)', [@channel, order.n.to_s])
    heard = @connection.notifies
    heard && heard[:extra]
  end

  # Types of one's own are text to it.
  def feel(order)
    array = PG::TextEncoder::Array.new
    values = [order.client, order.n, order.mood, array.encode([order.mood, 'ok']), "(street,\"#{order.mood}\")"]
    run('INSERT INTO feeling (client, n, mood, moods, spot) VALUES ($1, $2, $3, $4, $5)', values)
    sql = 'SELECT mood, moods, (spot).street, (spot).mood FROM feeling WHERE client = $1 AND n = $2'
    mood, moods, *spot = run(sql, [order.client, order.n]).values.first
    [mood, PG::TextDecoder::Array.new.decode(moods), spot]
  end
end

def afterwards(driver, order, session, types, done)
  check('parcel', driver.parcel(order), [order.body, order.sent])
  if (order.n % 3).zero?
    check('collision', driver.collide(order, order.n.even?), '23505')
    done[:refused] += 1
  end
  if session
    check('work_mem', driver.setting, '7MB')
    check('notification', driver.echo(order), order.n.to_s)
  end
  check('feeling', driver.feel(order), [order.mood, [order.mood, 'ok'], ['street', order.mood]]) if types
end

def rounds(driver, client, session, types, pace, stop, done)
  (1..ROUNDS_MAX).each do |n|
    return unless stop.empty?

    order = Order.new(client, n)
    begin
      driver.transfer(order)
    rescue PG::Error => e
      return tell(unknown: n, error: "transfer: #{text(e)}")
    end
    tell(acknowledged: n)
    afterwards(driver, order, session, types, done)
    done[:rounds] = n
    sleep(pace)
  end
end

mode, client, pooling, types, pace_ms = ARGV
tell(version: PG::VERSION)
stop = Queue.new
Thread.new do
  $stdin.gets
  stop << true
end
done = { rounds: 0, refused: 0 }
begin
  driver = Driver.new(mode, client.to_i)
  driver.begin_session if pooling == 'session'
  rounds(driver, client.to_i, pooling == 'session', types == '1', pace_ms.to_i / 1000.0, stop, done)
rescue StandardError => e
  tell(error: text(e))
end
tell(done: done)
