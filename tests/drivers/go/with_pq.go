package main

import (
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/lib/pq"
)

// lib/pq by database/sql over one connection. Modes: plain (a Parse and a Sync before each Bind, unnamed), binary
// (binary_parameters: one round trip), prepared (by name, kept).
type withPq struct {
	db       *sql.DB
	prepared map[string]*sql.Stmt
	listener *pq.Listener
	channel  string
	keep     bool
}

func connectPq(mode string, client int) (driver, error) {
	options := "sslmode=disable"
	if mode == "binary" {
		options += " binary_parameters=yes"
	}
	db, err := sql.Open("postgres", options)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	d := &withPq{db: db, prepared: map[string]*sql.Stmt{}, channel: fmt.Sprintf("echo_%d", client), keep: mode == "prepared"}
	d.listener = pq.NewListener(options, time.Second, time.Minute, func(event pq.ListenerEventType, err error) {
		if err != nil {
			tell(map[string]interface{}{"error": "listener: " + err.Error()})
		}
	})
	return d, db.Ping()
}

// run is a statement in a transaction, or alone when there is none.
func (d *withPq) run(tx *sql.Tx, text string, values ...interface{}) error {
	if d.keep {
		statement, err := d.statement(text, tx)
		if err != nil {
			return err
		}
		_, err = statement.Exec(values...)
		return err
	}
	if tx != nil {
		_, err := tx.Exec(text, values...)
		return err
	}
	_, err := d.db.Exec(text, values...)
	return err
}

func (d *withPq) statement(text string, tx *sql.Tx) (*sql.Stmt, error) {
	statement, err := d.prepared[text], error(nil)
	if statement == nil {
		return nil, fmt.Errorf("not prepared: %s", text)
	}
	if tx != nil {
		statement = tx.Stmt(statement)
	}
	return statement, err
}

// prepare keeps a statement. Not inside a transaction: that has the only connection.
func (d *withPq) prepare(texts ...string) error {
	for _, text := range texts {
		if !d.keep || d.prepared[text] != nil {
			continue
		}
		statement, err := d.db.Prepare(text)
		if err != nil {
			return err
		}
		d.prepared[text] = statement
	}
	return nil
}

const (
	ledgerText  = "INSERT INTO ledger (client, n, aid, delta) VALUES ($1, $2, $3, $4)"
	accountText = "UPDATE accounts SET abalance = abalance + $1 WHERE aid = $2"
	parcelText  = "INSERT INTO parcel (client, n, body, sent) VALUES ($1, $2, $3, $4)"
	lookText    = "SELECT body, sent FROM parcel WHERE client = $1 AND n = $2"
	notifyText  = "SELECT pg_notify($1, $2)"
	feelText    = "INSERT INTO feeling (client, n, mood, moods, spot) VALUES ($1, $2, $3, $4, $5)"
	feltText    = "SELECT mood, moods, spot FROM feeling WHERE client = $1 AND n = $2"
)

func (d *withPq) transfer(o order) error {
	if err := d.prepare(ledgerText, accountText, parcelText, lookText); err != nil {
		return err
	}
	tx, err := d.db.Begin()
	if err != nil {
		return err
	}
	if err = d.run(tx, ledgerText, o.client, o.n, o.aid, o.delta); err == nil {
		err = d.run(tx, accountText, o.delta, o.aid)
	}
	if err == nil {
		err = d.run(tx, parcelText, o.client, o.n, o.body, o.sent)
	}
	if err != nil {
		_ = tx.Rollback()
		return err
	}
	return tx.Commit()
}

func (d *withPq) row(text string, values ...interface{}) *sql.Row {
	if d.keep && d.prepared[text] != nil {
		return d.prepared[text].QueryRow(values...)
	}
	return d.db.QueryRow(text, values...)
}

func (d *withPq) parcel(o order) (body []byte, sent time.Time, err error) {
	err = d.row(lookText, o.client, o.n).Scan(&body, &sent)
	return
}

func (d *withPq) collide(o order, inTransaction bool) string {
	var tx *sql.Tx
	if inTransaction {
		begun, err := d.db.Begin()
		if err != nil {
			return err.Error()
		}
		tx = begun
		defer tx.Rollback()
	}
	err := d.run(tx, parcelText, o.client, o.n, o.body, o.sent)
	var refused *pq.Error
	if errors.As(err, &refused) {
		return string(refused.Code)
	}
	return fmt.Sprint(err)
}

func (d *withPq) beginSession() error {
	if _, err := d.db.Exec("SET work_mem = '7MB'"); err != nil {
		return err
	}
	return d.listener.Listen(d.channel)
}

func (d *withPq) setting() (setting string, err error) {
	err = d.db.QueryRow("SHOW work_mem").Scan(&setting)
	return
}

func (d *withPq) echo(o order) (string, error) {
	if err := d.prepare(notifyText); err != nil {
		return "", err
	}
	if err := d.run(nil, notifyText, d.channel, fmt.Sprint(o.n)); err != nil {
		return "", err
	}
	select {
	case heard := <-d.listener.Notify:
		if heard == nil {
			return "", errors.New("the listener has lost its connection")
		}
		return heard.Extra, nil
	case <-time.After(20 * time.Second):
		return "", errors.New("nothing heard for 20 s")
	}
}

func (d *withPq) feel(o order) (string, error) {
	if err := d.prepare(feelText, feltText); err != nil {
		return "", err
	}
	if err := d.run(nil, feelText, o.client, o.n, o.mood, pq.Array([]string{o.mood, "ok"}), o.spot()); err != nil {
		return "", err
	}
	var mood, array, spot string
	err := d.row(feltText, o.client, o.n).Scan(&mood, &array, &spot)
	return fmt.Sprint(mood, array, spot), err
}
