import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.time.Instant;
import java.time.OffsetDateTime;
import java.time.ZoneOffset;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.util.PGobject;

/**
 * pgJDBC on the course; what that is and says: README.md one directory up. Modes: server (statements prepared by name on
 * the server at their first use, results binary where the driver knows how), client (never by name).
 */
public final class Course {
    static final int ROUNDS_MAX = 2000;
    static final Instant EPOCH = Instant.parse("2026-01-01T00:00:00Z");
    static final String[] MOODS = {"ok", "so, so", "it's {bad}"};

    final Connection connection;
    final Map<String, PreparedStatement> kept = new HashMap<>();
    final int client;

    Course(String mode, int client) throws SQLException {
        Properties properties = new Properties();
        properties.setProperty("user", System.getenv("PGUSER"));
        properties.setProperty("password", System.getenv("PGPASSWORD"));
        properties.setProperty("prepareThreshold", mode.equals("server") ? "1" : "0");
        properties.setProperty("ApplicationName", System.getenv().getOrDefault("PGAPPNAME", "pgjdbc"));
        String at = System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        connection = DriverManager.getConnection("jdbc:postgresql://" + at, properties);
        this.client = client;
    }

    /** A statement that is prepared once and kept for the life of the connection. */
    PreparedStatement statement(String sql) throws SQLException {
        PreparedStatement statement = kept.get(sql);
        if (statement == null) {
            statement = connection.prepareStatement(sql);
            kept.put(sql, statement);
        }
        return statement;
    }

    static int aid(int client, int n) {
        return 1 + (client * 31 + n) % 1000;
    }

    static byte[] body(int n) {
        byte[] body = new byte[300];
        for (int place = 0; place < body.length; place++) {
            body[place] = (byte) (place + n);
        }
        return body;
    }

    static OffsetDateTime sent(int n) {
        return EPOCH.plusMillis(n).atOffset(ZoneOffset.UTC);
    }

    void transfer(int n) throws SQLException {
        connection.setAutoCommit(false);
        PreparedStatement ledger = statement("INSERT INTO ledger (client, n, aid, delta) VALUES (?, ?, ?, ?)");
        ledger.setInt(1, client);
        ledger.setLong(2, n);
        ledger.setLong(3, aid(client, n));
        ledger.setLong(4, n % 7 - 3);
        ledger.executeUpdate();
        PreparedStatement account = statement("UPDATE accounts SET abalance = abalance + ? WHERE aid = ?");
        account.setLong(1, n % 7 - 3);
        account.setLong(2, aid(client, n));
        account.executeUpdate();
        send(n);
        connection.commit();
        connection.setAutoCommit(true);
    }

    void send(int n) throws SQLException {
        PreparedStatement parcel = statement("INSERT INTO parcel (client, n, body, sent) VALUES (?, ?, ?, ?)");
        parcel.setInt(1, client);
        parcel.setLong(2, n);
        parcel.setBytes(3, body(n));
        parcel.setObject(4, sent(n));
        parcel.executeUpdate();
    }

    void checkParcel(int n) throws SQLException {
        PreparedStatement look = statement("SELECT body, sent FROM parcel WHERE client = ? AND n = ?");
        look.setInt(1, client);
        look.setLong(2, n);
        try (ResultSet row = look.executeQuery()) {
            check("row", row.next(), true);
            check("body", Arrays.toString(row.getBytes(1)), Arrays.toString(body(n)));
            check("sent", row.getObject(2, OffsetDateTime.class).toInstant(), sent(n).toInstant());
        }
    }

    String collide(int n, boolean inTransaction) throws SQLException {
        connection.setAutoCommit(!inTransaction);
        try {
            send(n);
            return "nothing";
        } catch (SQLException error) {
            return error.getSQLState();
        } finally {
            if (inTransaction) {
                connection.rollback();
            }
            connection.setAutoCommit(true);
        }
    }

    void beginSession() throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute("SET work_mem = '7MB'");
            statement.execute("LISTEN echo_" + client);
        }
    }

    void checkSession(int n) throws SQLException {
        try (ResultSet row = statement("SHOW work_mem").executeQuery()) {
            row.next();
            check("work_mem", row.getString(1), "7MB");
        }
        PreparedStatement notify = statement("SELECT pg_notify(?, ?)");
        notify.setString(1, "echo_" + client);
        notify.setString(2, Integer.toString(n));
        notify.executeQuery().close();
        PGNotification[] heard = connection.unwrap(PGConnection.class).getNotifications();
        check("notification", heard == null || heard.length == 0 ? null : heard[0].getParameter(), Integer.toString(n));
    }

    static PGobject typed(String type, String value) throws SQLException {
        PGobject object = new PGobject();
        object.setType(type);
        object.setValue(value);
        return object;
    }

    void checkFeeling(int n) throws SQLException {
        String mood = MOODS[n % 3];
        PreparedStatement feel =
            statement("INSERT INTO feeling (client, n, mood, moods, spot) VALUES (?, ?, ?, ?, ?)");
        feel.setInt(1, client);
        feel.setLong(2, n);
        feel.setObject(3, typed("mood", mood));
        feel.setArray(4, connection.createArrayOf("mood", new String[] {mood, "ok"}));
        feel.setObject(5, typed("spot", "(street,\"" + mood + "\")"));
        feel.executeUpdate();
        PreparedStatement felt = statement("SELECT mood, moods, spot FROM feeling WHERE client = ? AND n = ?");
        felt.setInt(1, client);
        felt.setLong(2, n);
        try (ResultSet row = felt.executeQuery()) {
            row.next();
            check("mood", row.getString(1), mood);
            check("moods", Arrays.toString((Object[]) row.getArray(2).getArray()), Arrays.toString(new String[] {mood, "ok"}));
            String spot = row.getString(3).replace("\"", "");
            check("spot", spot, "(street," + mood + ")");
        }
    }

    static void check(String what, Object found, Object wanted) {
        if (!wanted.equals(found)) {
            throw new IllegalStateException(what + ": " + found + ", wanted " + wanted);
        }
    }

    static void tell(String line) {
        System.out.println(line);
        System.out.flush();
    }

    static String text(Exception error) {
        String text = error.toString().replace("\\", "\\\\").replace("\"", "\\\"");
        return '"' + text.replaceAll("[\\x00-\\x1f]", " ") + '"';
    }

    public static void main(String[] args) throws InterruptedException {
        if (args[0].equals("version")) {
            // Driver and program load: that is all there is to know.
            tell(new org.postgresql.Driver().getMajorVersion() + "");
            return;
        }
        int client = Integer.parseInt(args[1]);
        boolean session = args[2].equals("session");
        boolean types = args[3].equals("1");
        CountDownLatch stop = new CountDownLatch(1);
        Thread listener = new Thread(() -> {
            try {
                System.in.read();
            } catch (java.io.IOException error) {
                // Its end is an order to stop, too.
            }
            stop.countDown();
        });
        listener.setDaemon(true);
        listener.start();
        int rounds = 0;
        int refused = 0;
        try {
            Course course = new Course(args[0], client);
            tell("{\"version\": \"" + course.connection.getMetaData().getDriverVersion() + "\"}");
            if (session) {
                course.beginSession();
            }
            for (int n = 1; n <= ROUNDS_MAX && stop.getCount() > 0; n++) {
                try {
                    course.transfer(n);
                } catch (SQLException error) {
                    tell("{\"unknown\": " + n + ", \"error\": " + text(error) + "}");
                    break;
                }
                tell("{\"acknowledged\": " + n + "}");
                course.checkParcel(n);
                if (n % 3 == 0) {
                    check("collision", course.collide(n, n % 2 == 0), "23505");
                    refused++;
                }
                if (session) {
                    course.checkSession(n);
                }
                if (types) {
                    course.checkFeeling(n);
                }
                rounds = n;
                stop.await(Long.parseLong(args[4]), TimeUnit.MILLISECONDS);
            }
        } catch (SQLException | IllegalStateException error) {
            tell("{\"error\": " + text(error) + "}");
        }
        tell("{\"done\": {\"rounds\": " + rounds + ", \"refused\": " + refused + "}}");
        System.exit(0);
    }
}
