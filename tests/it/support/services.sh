# Private RabbitMQ and PostgreSQL instances, each in a directory of its own. Sourced by ./dev, which sets SERVICES_STARTED,
# the directory where every started one is noted.
# Guarantee: listens on 127.0.0.1 only, never runs as root, and touches no other instance of the machine.
#
# A service's directory holds: port (kept for its life), url (0600: it carries a password), data/ (a link to a directory
# under /tmp where the unprivileged account cannot enter the service's own), *.pid ("PID START-TIME").
# shellcheck shell=bash

SERVICE_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
SERVICE_DEADLINE_S=120

say() { printf '%s\n' "dev: $*" >&2; }
die() { say "$*"; exit 1; }

# Debian's /usr/sbin/rabbitmq-server changes the account by itself, so the scripts behind it are called.
rabbitmq_bin() { local dir=/usr/lib/rabbitmq/bin; [[ -x $dir/rabbitmq-server ]] && echo "$dir"; }

# The newest installed PostgreSQL, 13 or later.
postgres_bin() {
  local version
  version=$(printf '%s\n' /usr/lib/postgresql/*/bin/initdb | cut -d/ -f5 | sort -n | tail -n 1)
  [[ $version =~ ^[0-9]+$ ]] && ((version >= 13)) && echo "/usr/lib/postgresql/$version/bin"
}

# service start|stop|kill|remove|ctl rabbitmq|postgres DIR. `start` prints the URL; started again on the same DIR it keeps
# port, password and data. `kill` is a crash (SIGKILL). `remove` stops it and deletes DIR. `ctl` runs rabbitmqctl or psql.
service() {
  (($# >= 3)) || die "usage: ./dev service start|stop|kill|remove|ctl rabbitmq|postgres DIR [ARGUMENTS]"
  local action=$1 kind=$2 dir
  dir=$(realpath -m -- "$3")
  shift 3
  [[ $kind == rabbitmq || $kind == postgres ]] || die "no such service: $kind (rabbitmq, postgres)"
  case $action in
    start) service_launch "$kind" "$dir" && service_await "$kind" "$dir" && cat "$dir/url" ;;
    stop | kill) service_end "$action" "$kind" "$dir" ;;
    remove)
      service_end kill "$kind" "$dir"
      [[ ! -d $dir/data ]] || rm -rf -- "$(realpath -- "$dir/data")"
      rm -rf -- "$dir"
      ;;
    ctl) "${kind}_ctl" "$dir" "$@" ;;
    *) die "no such action: $action (start, stop, kill, remove, ctl)" ;;
  esac
}

# Launching and awaiting are apart so that `up` can let both services start at once.
service_launch() {
  local kind=$1 dir=$2
  "${kind}_bin" >/dev/null || die "$kind is not installed; see ./dev help"
  mkdir -p -- "$dir"
  # For services_down, whatever happens to this process.
  printf '%s\n' "$dir" >"$SERVICES_STARTED/$kind-$(cksum <<<"$dir" | cut -d' ' -f1)"
  (
    flock 9
    "${kind}_running" "$dir" >/dev/null && exit 0
    [[ -e $dir/data ]] || service_make_data "$kind" "$dir"
    "${kind}_launch" "$dir"
  ) 8>&- 9>"$dir/lock" || die "$kind did not start; see $dir/output and $dir/data"
}

service_await() {
  local kind=$1 dir=$2 end=$((SECONDS + SERVICE_DEADLINE_S))
  until "${kind}_answers" "$dir"; do
    "${kind}_running" "$dir" >/dev/null || die "$kind ended while starting; see $dir/output and $dir/data"
    ((SECONDS < end)) || die "$kind did not answer within $SERVICE_DEADLINE_S s; see $dir/output and $dir/data"
    sleep 0.05
  done
}

service_end() {
  local action=$1 kind=$2 dir=$3
  [[ -d $dir/data ]] || return 0
  (
    flock 9
    "${kind}_$action" "$dir"
  ) 9>"$dir/lock"
}

service_make_data() {
  local kind=$1 dir=$2 account data=$2/data
  rm -f -- "$data" "$dir/port" "$dir/url" # a link whose end was cleaned away
  account=$(account_for "$kind")
  if [[ -n $account ]] && ! as_account "$kind" test -x "$dir"; then
    data=$(mktemp -d "/tmp/sendoff-$kind.XXXXXX")
    ln -s -- "$data" "$dir/data"
  fi
  mkdir -p -m 0700 -- "$data"
  [[ -z $account ]] || chown "$account:" "$data"
}

# ---- accounts and processes

# Empty when the caller is not root: then the service runs as the caller.
account_for() {
  ((EUID == 0)) || return 0
  if getent passwd "$1" >/dev/null; then echo "$1"; else echo nobody; fi
}

# Sets AS: what to put before a command so that it runs as the service's account, with nothing of the caller's environment.
prefix_for() {
  local account
  account=$(account_for "$1")
  AS=(env -i PATH="$SERVICE_PATH" LANG=C.UTF-8)
  [[ -z $account ]] || AS=(setpriv --reuid "$account" --regid "$(id -g "$account")" --clear-groups -- "${AS[@]}")
}

# as_account KIND COMMAND...: from /, for the account may not be let into the caller's directory.
as_account() {
  prefix_for "$1"
  (cd / && exec "${AS[@]}" "${@:2}")
}

# detach KIND PIDFILE COMMAND...: in a session of its own (a Ctrl-C is not for it), without our locks. It notes its id itself
# before it lets go of the service's lock, and before this returns: who holds the lock knows of every process, and who asks
# for this one is not told of the one before it.
detach() {
  local pidfile=$2
  prefix_for "$1"
  rm -f -- "$pidfile"
  (
    # No $(...) here: to such a one a Ctrl-C is not ignored.
    { printf '%s ' "$BASHPID" && start_time "$BASHPID"; } >"$pidfile.new" && mv -- "$pidfile.new" "$pidfile"
    cd /
    exec setsid "${AS[@]}" "${@:3}" </dev/null >>"${pidfile%/*}/output" 2>&1 9>&-
  ) &
  until [[ -e $pidfile ]] || ! kill -0 "$!" 2>/dev/null; do sleep 0.01; done
}

# A process's start time in clock ticks since boot: with the id it names one process, whatever ids are used again.
# Fails for one that has ended, waited for or not. Behind the name in parentheses come state (3rd field) to start (22nd).
start_time() {
  local stat fields
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  read -ra fields <<<"${stat##*) }"
  [[ ${fields[0]} != Z ]] && echo "${fields[19]}"
}

# Prints the id in PIDFILE if that very process lives.
living() {
  local pid started
  [[ -s $1 ]] && read -r pid started <"$1" && [[ $(start_time "$pid") == "$started" ]] && echo "$pid"
}

# end SIGNAL PID: signals, waits, after 20 s kills; then kills what is left of its children. Before a KILL all of them are
# halted, or one could be born unseen.
end() {
  local pid=$2 started members=() member seen=-1 end=$((SECONDS + 20))
  started=$(start_time "$pid") || return 0
  [[ $1 != KILL ]] || kill -STOP "$pid" 2>/dev/null || true
  while ((${#members[@]} != seen)); do
    seen=${#members[@]}
    mapfile -t members < <(descendants "$pid")
    [[ $1 == KILL ]] || break
    for member in "${members[@]}"; do kill -STOP "${member% *}" 2>/dev/null || true; done
  done
  kill "-$1" "$pid" 2>/dev/null || true
  while [[ $(start_time "$pid") == "$started" ]]; do
    ((SECONDS < end)) || kill -KILL "$pid" 2>/dev/null || true
    sleep 0.02
  done
  for member in "${members[@]}"; do
    while [[ $(start_time "${member% *}") == "${member#* }" ]]; do
      kill -KILL "${member% *}" 2>/dev/null || true
      sleep 0.02
    done
  done
}

# "PID START-TIME" of each.
descendants() {
  local stat fields pid
  for stat in /proc/[0-9]*/stat; do
    { read -r stat <"$stat"; } 2>/dev/null || continue
    read -ra fields <<<"${stat##*) }"
    [[ ${fields[1]} == "$1" ]] || continue
    pid=${stat%% *}
    echo "$pid ${fields[19]}"
    descendants "$pid"
  done
}

random_word() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

connects() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The first of four free ports, below the range from which the system takes outgoing ones.
free_ports() {
  local base port
  while :; do
    base=$((20000 + SRANDOM % 3000 * 4))
    for port in "$base" $((base + 1)) $((base + 2)) $((base + 3)); do
      connects "$port" && continue 2
    done
    echo "$base"
    return
  done
}

# ---- RabbitMQ: port is AMQP, port + 1 Erlang's distribution, port + 2 its name server (epmd)

rabbitmq_environment() {
  local data port
  data=$(realpath -- "$1/data")
  port=$(cat "$1/port")
  RABBITMQ=(
    HOME="$data" # Erlang's cookie
    ERL_EPMD_PORT=$((port + 2)) ERL_EPMD_ADDRESS=127.0.0.1
    RABBITMQ_NODENAME="sendoff-$port@localhost"
    RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT="$port" RABBITMQ_DIST_PORT=$((port + 1))
    RABBITMQ_CTL_DIST_PORT_MIN=32768 RABBITMQ_CTL_DIST_PORT_MAX=60999
    RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1}"
    RABBITMQ_CONF_ENV_FILE="$data/none.conf" RABBITMQ_CONFIG_FILE="$data/rabbitmq.conf"
    RABBITMQ_ADVANCED_CONFIG_FILE="$data/none.config" RABBITMQ_ENABLED_PLUGINS_FILE="$data/enabled_plugins"
    RABBITMQ_MNESIA_BASE="$data/mnesia" RABBITMQ_LOG_BASE="$data/log" RABBITMQ_GENERATED_CONFIG_DIR="$data/generated"
    RABBITMQ_PID_FILE="$data/rabbitmq.pid"
    ERL_FLAGS='-start_epmd false' # ours runs; another would outlive the broker
    RUNNING_UNDER_SYSTEMD=true # the script then becomes the server instead of its parent
  )
}

rabbitmq_launch() {
  local dir=$1 tries=0
  rabbitmq_kill "$dir" # of a broker that ended by itself, epmd is left
  while :; do
    [[ -s $dir/port ]] || free_ports >"$dir/port"
    [[ -s $dir/url ]] || rabbitmq_configure "$dir"
    rabbitmq_environment "$dir"
    # epmd takes its port at once, the broker seconds later: who has the one has all four.
    detach rabbitmq "$dir/epmd.pid" "${RABBITMQ[@]}" epmd
    sleep 0.2
    living "$dir/epmd.pid" >/dev/null && break
    if [[ -d $dir/data/mnesia ]] || ((++tries == 5)); then
      say "port $(cat "$dir/port") or one of the next two is taken"
      return 1
    fi
    rm -f -- "$dir/port" "$dir/url"
  done
  detach rabbitmq "$dir/rabbitmq.pid" "${RABBITMQ[@]}" "$(rabbitmq_bin)/rabbitmq-server"
}

# The URL is written last: with it the service is complete.
rabbitmq_configure() {
  local dir=$1 password account file
  password=$(random_word)
  account=$(account_for rabbitmq)
  rm -f -- "$dir/data/.erlang.cookie"
  (
    umask 077
    cat >"$dir/data/rabbitmq.conf" <<CONF
default_user = sendoff
default_pass = $password
vm_memory_high_watermark.absolute = 1GB
disk_free_limit.absolute = 50MB
log.file.level = warning
log.console = false
CONF
    echo '[].' >"$dir/data/enabled_plugins"
    random_word >"$dir/data/.erlang.cookie"
    for file in rabbitmq.conf enabled_plugins .erlang.cookie; do
      [[ -z $account ]] || chown "$account:" "$dir/data/$file"
    done
    chmod 0400 "$dir/data/.erlang.cookie"
    echo "amqp://sendoff:$password@127.0.0.1:$(cat "$dir/port")/%2f" >"$dir/url"
  )
}

rabbitmq_running() { living "$1/rabbitmq.pid"; }

# The broker listens last of all, and answers the protocol's header with a method frame (type 1).
rabbitmq_answers() {
  (
    exec 3<>"/dev/tcp/127.0.0.1/$(cat "$1/port")" && printf 'AMQP\0\0\11\1' >&3 &&
      IFS= read -r -t 2 -n 1 -u 3 byte && [[ $byte == $'\1' ]]
  ) 2>/dev/null
}

rabbitmq_stop() {
  if rabbitmq_answers "$1"; then rabbitmq_end TERM "$1"; else rabbitmq_kill "$1"; fi # while it boots it heeds no TERM
}
rabbitmq_kill() { rabbitmq_end KILL "$1"; }
rabbitmq_end() {
  local file pid
  for file in rabbitmq.pid epmd.pid; do
    pid=$(living "$2/$file") || continue
    end "$1" "$pid"
  done
}

rabbitmq_ctl() {
  rabbitmq_environment "$1"
  shift
  as_account rabbitmq "${RABBITMQ[@]}" "$(rabbitmq_bin)/rabbitmqctl" "$@"
}

# ---- PostgreSQL

# The cluster by its own path: the one through the service's directory may be closed to the account.
cluster() { echo "$(realpath -- "$1/data")/cluster"; }

postgres_launch() {
  local dir=$1 tries=0 fresh=
  [[ -s $dir/url ]] || fresh=yes
  while :; do
    # The fourth of the four, so that no broker's triple is taken.
    [[ -s $dir/port ]] || echo $(($(free_ports) + 3)) >"$dir/port"
    [[ -s $dir/url ]] || postgres_initialise "$dir" || return 1
    # Not interrupted, or it could leave a server that has not noted its id yet.
    (trap '' INT TERM HUP && as_account postgres "$(postgres_bin)/pg_ctl" start -s -w -t "$SERVICE_DEADLINE_S" \
      -D "$(cluster "$dir")" -l "$(cluster "$dir").log" -o "-p $(cat "$dir/port") ${POSTGRES_OPTIONS:-}" \
      >>"$dir/output" 2>&1 9>&-) && return
    [[ -n $fresh ]] && connects "$(cat "$dir/port")" && ((++tries < 5)) || return 1
    rm -f -- "$dir/port" "$dir/url" # another took the port between our look and the start
  done
}

postgres_initialise() {
  local dir=$1 password account
  password=$(random_word)
  account=$(account_for postgres)
  rm -rf -- "$dir/data/cluster"
  (umask 077 && echo "$password" >"$dir/data/cluster.password")
  [[ -z $account ]] || chown "$account:" "$dir/data/cluster.password"
  as_account postgres "$(postgres_bin)/initdb" -D "$(cluster "$dir")" -U sendoff -A scram-sha-256 -E UTF8 --no-locale \
    --no-sync --pwfile="$(cluster "$dir").password" >>"$dir/output" 2>&1 || return 1
  rm -f -- "$dir/data/cluster.password"
  cat >>"$dir/data/cluster/postgresql.conf" <<'CONF'
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 400
shared_buffers = 128MB
CONF
  (umask 077 && echo "postgres://sendoff:$password@127.0.0.1:$(cat "$dir/port")/postgres" >"$dir/url")
}

# Prints the server's id. Looks at its working directory too, which is the cluster's: the id may be another's by now.
postgres_running() {
  local pid
  pid=$(head -n 1 "$1/data/cluster/postmaster.pid" 2>/dev/null) && start_time "$pid" >/dev/null &&
    [[ $(realpath "/proc/$pid/cwd") == $(cluster "$1") ]] && echo "$pid"
}

postgres_answers() { postgres_running "$1" >/dev/null; } # pg_ctl has waited for it

postgres_stop() {
  ! postgres_answers "$1" ||
    as_account postgres "$(postgres_bin)/pg_ctl" stop -w -t 60 -s -m fast -D "$(cluster "$1")" ||
    postgres_kill "$1"
}

# Its children go too: while one lives, a new server refuses the shared memory. To a new server, an id that nobody has
# waited for yet looks alive: hence the file.
postgres_kill() {
  local pid
  pid=$(postgres_running "$1") || return 0
  end KILL "$pid"
  rm -f -- "$1/data/cluster/postmaster.pid"
}

postgres_ctl() {
  local url
  url=$(cat "$1/url")
  shift
  "$(postgres_bin)/psql" "$url" "$@"
}
