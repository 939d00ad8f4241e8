// Command pause holds a pod's namespaces open: it sleeps until it is told to stop. Go's runtime needs no other process, and
// each container of a pod is the first of its own PID namespace, so there are no orphans to reap.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	<-stop
}
