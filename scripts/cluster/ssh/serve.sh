#!/usr/bin/env bash
# Serves one deployment on several hosts: starts a launcher on each by ssh, and ends them together.
#
#   serve.sh HOSTS KEYS [FLAGS of `crosspool serve` ...]
#
# HOSTS is a file with one host a line, as ssh knows it; the first is node 0. KEYS is the file of
# `crosspool keys new`, which each host gets for as long as its launcher runs. Where they are set,
#   CROSSPOOL        is the command on the hosts (crosspool),
#   DIST_INIT_ADDR   is where other hosts reach node 0 (the first host's name, port 20000),
#   CROSSPOOL_DIR    is a folder on each host for the keys (.crosspool in the home folder),
#   SSH              is the command that reaches a host (ssh -o BatchMode=yes).
# docs/deploy/ssh.md has more.
set -euo pipefail

fail() {
  echo "serve.sh: $1" >&2
  exit 2
}

# Prints words so that any shell reads them as they are.
quoted() {
  local word
  for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}

[ $# -ge 2 ] || fail "give a file of hosts and a file of keys: serve.sh HOSTS KEYS [FLAGS]"
hosts_file=$1 keys=$2
shift 2
[ -f "$hosts_file" ] || fail "$hosts_file is no file of hosts"
[ -f "$keys" ] || fail "$keys is no file of keys: make one with \`crosspool keys new --out $keys\`"
mapfile -t hosts < <(sed 's/#.*//; s/[[:space:]]//g; /^$/d' "$hosts_file")
[ ${#hosts[@]} -ge 2 ] || fail "$hosts_file has ${#hosts[@]} hosts; name two or more, one a line"
read -ra ssh <<<"${SSH:-ssh -o BatchMode=yes}"
read -ra crosspool <<<"${CROSSPOOL:-crosspool}"
address=${DIST_INIT_ADDR:-${hosts[0]#*@}:20000}
folder=${CROSSPOOL_DIR:-.crosspool}

# Runs on a host, as: FOLDER KEYS COMMAND... Ends the launcher when nothing holds its input open any
# more, so also when this script is killed, or the connection to it is lost.
# shellcheck disable=SC2016
on_host='
keys=$1/$2
shift 2
exec 3<&0
"$@" --keys "$keys" </dev/null 3<&- &
launcher=$!
{
  while read -r _ <&3; do :; done
  kill -TERM "$launcher"
} >/dev/null 2>&1 &
watch=$!
wait "$launcher"
status=$?
kill "$watch" 2>/dev/null
rm -f "$keys"
exit $status'

# The file has a name for each host, since hosts may share their home folders.
keys_on() {
  echo "deployment-$1.keys"
}

send_keys() {
  local file
  file=$folder/$(keys_on "$1")
  "${ssh[@]}" "${hosts[$1]}" "umask 077; mkdir -p $(quoted "$folder") && rm -f $(quoted "$file") &&
    cat > $(quoted "$file")" <"$keys"
}

start() {
  local node=$1 status
  shift
  local words=("${crosspool[@]}" serve "$@" --nnodes "${#hosts[@]}" --node-rank "$node")
  words+=(--dist-init-addr "$address")
  set +e
  "${ssh[@]}" "${hosts[$node]}" \
    "sh -c $(quoted "$on_host" sh "$folder" "$(keys_on "$node")" "${words[@]}")" 2>&1 |
    sed -u "s/^/node $node: /"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] ||
    echo "serve.sh: node $node (${hosts[$node]}) has ended with status $status" >&2
  return "$status"
}

for node in "${!hosts[@]}"; do
  send_keys "$node" || fail "node $node (${hosts[$node]}) has not got the keys"
done

# Every launcher has this pipe as its input; they end once this script holds it no more.
pipe=$(mktemp -u)
mkfifo -m 600 "$pipe"
exec {hold}<>"$pipe"
exec {input}<"$pipe"
rm "$pipe"
is_told=
end() {
  [ -z "$hold" ] || exec {hold}>&-
  hold=
}
trap 'is_told=1; end' INT TERM HUP

launchers=()
for node in "${!hosts[@]}"; do
  start "$node" "$@" <&"$input" {hold}>&- &
  launchers+=($!)
done
exec {input}<&-

# With the first launcher that ends, all end. A signal ends the wait, too.
status=0
wait -n || status=$?
[ -z "$is_told" ] || status=0
end
trap '' INT TERM HUP
for launcher in "${launchers[@]}"; do
  wait "$launcher" || status=$((status ? status : $?))
done
exit "$status"
