package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgconn/stmtcache"
	"github.com/jackc/pgx/v4"
)

// pgx. Modes: cache (its default: statements prepared by name at their first use), describe (unnamed, descriptions kept),
// simple (simple queries).
type withPgx struct {
	conn    *pgx.Conn
	channel string
}

// Longer than any pause of a cutover; whoever waits so long has lost its server.
const patience = 30 * time.Second

func connectPgx(mode string, client int) (driver, error) {
	config, err := pgx.ParseConfig("sslmode=disable")
	if err != nil {
		return nil, err
	}
	switch mode {
	case "describe":
		config.BuildStatementCache = func(conn *pgconn.PgConn) stmtcache.Cache {
			return stmtcache.New(conn, stmtcache.ModeDescribe, 512)
		}
	case "simple":
		config.PreferSimpleProtocol = true
	}
	background, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.ConnectConfig(background, config)
	return &withPgx{conn, fmt.Sprintf("echo_%d", client)}, err
}

type runner interface {
	Exec(context.Context, string, ...interface{}) (pgconn.CommandTag, error)
}

func sendParcel(c context.Context, r runner, o order) error {
	_, err := r.Exec(c, parcelText, o.client, o.n, o.body, o.sent)
	return err
}

func (d *withPgx) transfer(o order) error {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return d.conn.BeginFunc(c, func(tx pgx.Tx) error {
		if _, err := tx.Exec(c, ledgerText, o.client, o.n, o.aid, o.delta); err != nil {
			return err
		}
		if _, err := tx.Exec(c, accountText, o.delta, o.aid); err != nil {
			return err
		}
		return sendParcel(c, tx, o)
	})
}

func (d *withPgx) parcel(o order) (body []byte, sent time.Time, err error) {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err = d.conn.QueryRow(c, lookText, o.client, o.n).Scan(&body, &sent)
	return
}

func (d *withPgx) collide(o order, inTransaction bool) string {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	if inTransaction {
		err = d.conn.BeginFunc(c, func(tx pgx.Tx) error { return sendParcel(c, tx, o) })
	} else {
		err = sendParcel(c, d.conn, o)
	}
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		return refused.Code
	}
	return fmt.Sprint(err)
}

func (d *withPgx) beginSession() error {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := d.conn.Exec(c, "SET work_mem = '7MB'"); err != nil {
		return err
	}
	_, err := d.conn.Exec(c, "LISTEN "+d.channel)
	return err
}

func (d *withPgx) setting() (setting string, err error) {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err = d.conn.QueryRow(c, "SHOW work_mem").Scan(&setting)
	return
}

func (d *withPgx) echo(o order) (string, error) {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := d.conn.Exec(c, notifyText, d.channel, fmt.Sprint(o.n)); err != nil {
		return "", err
	}
	heard, err := d.conn.WaitForNotification(c)
	if err != nil {
		return "", err
	}
	return heard.Payload, nil
}

func (d *withPgx) feel(o order) (string, error) {
	c, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := d.conn.Exec(c, feelText, o.client, o.n, o.mood, o.array(), o.spot()); err != nil {
		return "", err
	}
	var mood, array, spot string
	sql := "SELECT mood::text, moods::text, spot::text FROM feeling WHERE client = $1 AND n = $2"
	err := d.conn.QueryRow(c, sql, o.client, o.n).Scan(&mood, &array, &spot)
	return fmt.Sprint(mood, array, spot), err
}
