// The course that every driver of Go runs. What it does and says: README.md one directory up.
//
// The program's first argument names the driver, the others are those of all programs.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const roundsMax = 2000

var (
	epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	moods = []string{"ok", "so, so", "it's {bad}"}
)

type order struct {
	client, n, aid, delta int
	body                  []byte
	sent                  time.Time
	mood                  string
}

// What a driver has to be able to do; collide says the SQLSTATE that came.
type driver interface {
	transfer(order) error
	parcel(order) ([]byte, time.Time, error)
	collide(o order, inTransaction bool) string
	beginSession() error
	setting() (string, error)
	echo(order) (string, error)
	feel(order) (string, error)
}

func newOrder(client, n int) order {
	body := make([]byte, 300)
	for place := range body {
		body[place] = byte(place + n)
	}
	sent := epoch.Add(time.Duration(n) * time.Millisecond)
	return order{client, n, 1 + (client*31+n)%1000, n%7 - 3, body, sent, moods[n%3]}
}

// The text of what went in, for drivers that take types of one's own as text.
func (o order) array() string {
	return fmt.Sprintf("{\"%s\",ok}", o.mood)
}

func (o order) spot() string {
	return fmt.Sprintf("(street,\"%s\")", o.mood)
}

func tell(line map[string]interface{}) {
	text, _ := json.Marshal(line)
	fmt.Println(string(text))
}

func afterwards(d driver, o order, session, types bool) (refused int, err error) {
	body, sent, err := d.parcel(o)
	if err != nil {
		return 0, fmt.Errorf("parcel: %w", err)
	}
	if !bytes.Equal(body, o.body) || !sent.Equal(o.sent) {
		return 0, fmt.Errorf("parcel: %v %v, wanted %v %v", body, sent, o.body, o.sent)
	}
	if o.n%3 == 0 {
		if state := d.collide(o, o.n%2 == 0); state != "23505" {
			return 0, fmt.Errorf("collision: %s, wanted 23505", state)
		}
		refused = 1
	}
	if session {
		if setting, err := d.setting(); err != nil || setting != "7MB" {
			return refused, fmt.Errorf("work_mem: %s %v, wanted 7MB", setting, err)
		}
		if heard, err := d.echo(o); err != nil || heard != strconv.Itoa(o.n) {
			return refused, fmt.Errorf("notification: %s %v, wanted %d", heard, err, o.n)
		}
	}
	if types {
		wanted := strings.ReplaceAll(fmt.Sprint(o.mood, o.array(), o.spot()), "\"", "")
		if felt, err := d.feel(o); err != nil || strings.ReplaceAll(felt, "\"", "") != wanted {
			return refused, fmt.Errorf("feeling: %s %v, wanted %s", felt, err, wanted)
		}
	}
	return refused, nil
}

func connect(name, mode string, client int) (driver, error) {
	if name == "pq" {
		return connectPq(mode, client)
	}
	return connectPgx(mode, client)
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	name, mode, client := os.Args[1], os.Args[2], number(os.Args[3])
	if name == "version" {
		// The program runs on this machine: that is all there is to know.
		return
	}
	session, types, pace := os.Args[4] == "session", os.Args[5] == "1", number(os.Args[6])
	stop := make(chan struct{})
	go func() {
		// Its end is an order to stop, too.
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		close(stop)
	}()
	rounds, refused := 0, 0
	defer func() {
		tell(map[string]interface{}{"done": map[string]int{"rounds": rounds, "refused": refused}})
	}()
	d, err := connect(name, mode, client)
	if err == nil && session {
		err = d.beginSession()
	}
	if err != nil {
		tell(map[string]interface{}{"error": "connecting: " + err.Error()})
		return
	}
	for n := 1; n <= roundsMax; n++ {
		o := newOrder(client, n)
		if err := d.transfer(o); err != nil {
			tell(map[string]interface{}{"unknown": n, "error": "transfer: " + err.Error()})
			return
		}
		tell(map[string]interface{}{"acknowledged": n})
		more, err := afterwards(d, o, session, types)
		refused += more
		if err != nil {
			tell(map[string]interface{}{"error": fmt.Sprintf("round %d: %v", n, err)})
			return
		}
		rounds = n
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(pace) * time.Millisecond):
		}
	}
}
