for i in 1 2 3; do echo "$i of $THREADS"; sleep 0.1; done; cat
