-- commit.lua: apply one delta to one session, whole or not at all; also creates and rotates.
--
-- KEYS[1]   the session key, a hash
--
-- ARGV[1]   write id of this commit, 8 bytes; the reply echoes it
-- ARGV[2]   digest of the secret, 32 bytes; empty: whatever is current
-- ARGV[3]   numbers, packed: age of the request in microseconds; microseconds since the first sending of
--           this commit (0: this is the first); flags (1 create the session, 2 clear it before the fields
--           are set, 4 requests open at a rotation may still commit, 8 the touch interval is the default,
--           so that a lifetime of its own shortens it); idle lifetime in ms, where the session has none
--           of its own; touch interval in ms; absolute lifetime of a new session in ms (0: none); grace
--           time for former digests and empty sessions in ms; most bytes of the session, names and values
-- ARGV[4]   base, packed: version and write id; empty: a blind write
-- ARGV[5]   own commits of this request since the base, 4 bytes of each write id
-- ARGV[6]   fields set, packed: check (0 none, 1 report, 2 strict), ttl in ms (0 none), name, value
-- ARGV[7]   fields deleted, packed: check, name
-- ARGV[8]   fields that must not have changed either, packed names; '*': all of them
-- ARGV[9]   new digest, 32 bytes: rotate; empty: keep the secret
-- ARGV[10]  permanence: 0, 1, or empty for no change
-- ARGV[11]  idle lifetime of its own, ms; 0: none any more; empty: no change
-- ARGV[12]  principal: '=' and the text, '-' for none any more, empty for no change
-- ARGV[13]  label, in the same form
--
-- From ARGV[4] on, what is empty up to the end may be left out.
--
-- Reply: {code, write id, time in microseconds as 7 bytes, ...}, by code
--   applied   packed: version, the pair replaced (12 zeros: no longer known), TTL refreshed, expiry
--             changed (2: not known, an earlier sending was applied), @i, @v; then name and replaced
--             value (false: missing) of each field to report
--   conflict  @i, @v, then name and current value (false: missing) of each checked field that changed
--   gone      the session ended, or was cleared, after this request opened or its base was read
--   missing   there is no such session
--   stale     1 if the request was open before the rotation that made its digest a former one, else 0
--   large     bytes that the session would have had
--   unknown   sent again, and the ring no longer reaches back to the first sending
--   corrupt   what is stored is not of format 1

local session = KEYS[1]
local write_id = ARGV[1]
local digest = ARGV[2]
local age, resend, flags, default_lifetime, touch_interval, absolute, grace, max_bytes =
  struct.unpack('>I7I7BI6I6I6I6I4', ARGV[3])
local base = ARGV[4] or ''
local own = ARGV[5] or ''
local packed_sets = ARGV[6] or ''
local packed_deletes = ARGV[7] or ''
local packed_reads = ARGV[8] or ''
local new_digest = ARGV[9] or ''
local new_permanent = ARGV[10] or ''
local new_lifetime = ARGV[11] or ''
local new_principal = ARGV[12] or ''
local new_label = ARGV[13] or ''

local create, clear, in_flight, by_default = flags % 2 == 1, flags % 4 >= 2, flags % 8 >= 4, flags >= 8
local base_version, base_id
if base ~= '' then base_version, base_id = struct.unpack('>I4c8', base) end

local FORMAT = 1
local IDENTITY, IDENTITY_BYTES = '>Bc32I6I6', 45 -- format, digest, created ms, absolute deadline ms
local STATE, STATE_BYTES = '>I4c8I7I6I6I4BBI4', 41 -- version, write id, committed us, touched ms, ends ms,
                                                 -- bytes, permanent, any rare metadata, fields
local APPLIED = '>I4c12BB'
local FORMER, FORMER_BYTES = '>c32I7I6B', 46     -- digest, moment us, grace end ms, may commit
local NONE = ('\0'):rep(8)
local RING, RING_HEAD = '>I7I7B', 15                -- floor us, last halving us, ids from before it
local TRANSIT = 20000                            -- microseconds by which two calls' transits may differ
local EVERYTHING = 255                           -- a journal entry that names no fields
local QUIET, BUSY = 64, 768                      -- bytes of ring and of journal

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = math.floor(now_us / 1000)
local opened = now_us - age

local function answer(code, ...)
  return {code, write_id, struct.pack('>I7', now_us), ...}
end
local function answer_with(list, code, ...)
  local reply = answer(code, ...)
  for _, item in ipairs(list) do reply[#reply + 1] = item end
  return reply
end

-- What is used rarely is read only if the state says that there is any of it.
local meta = redis.call('HMGET', session, '@i', '@v', '@r', '@j', '@t')
local identity, state, ring, journal, ended = meta[1], meta[2], meta[3] or '', meta[4] or '', meta[5]
local formers, cleared, own_lifetime, principal, label, deadlines = '', false, false, false, false, false

local version, last_id, committed, touched, ends, bytes, permanent, fields = 0, NONE, 0, 0, 0, 0, 0, 0
local current_digest, created, absolute_end
if identity then
  if #identity ~= IDENTITY_BYTES or identity:byte() ~= FORMAT or not state or #state ~= STATE_BYTES
      or #ring < RING_HEAD or #journal < 8 then
    return answer('corrupt')
  end
  local _
  _, current_digest, created, absolute_end = struct.unpack(IDENTITY, identity)
  local rare
  version, last_id, committed, touched, ends, bytes, permanent, rare, fields = struct.unpack(STATE, state)
  if rare == 1 then
    local more = redis.call('HMGET', session, '@f', '@c', '@e', '@p', '@l', '@x')
    formers, cleared, own_lifetime = more[1] or '', more[2], more[3]
    principal, label, deadlines = more[4], more[5], more[6]
  end
end

-- Sent again: a commit that has been applied is answered, never applied a second time. First sendings
-- are looked up too, since a hung server may run a closed connection's sending after the one that followed.
local found = ring:find(write_id, 16, true)
if found then
  local behind = math.floor((#ring - found + 1) / 8) - 1
  local before = found > 23 and struct.pack('>I4c8', version - behind - 1, ring:sub(found - 8, found - 1))
    or ('\0'):rep(12)
  return answer('applied', struct.pack(APPLIED, version - behind, before, 0, 2) .. identity .. state)
end
-- Not in the ring, but it may have been there: from before the floor nobody can tell any more. When it was
-- first sent is known here to a call's transit only, so in doubt it is unknown, never applied again.
local floor_us = #ring >= RING_HEAD and struct.unpack('>I7', ring) or 0
if resend > 0 and floor_us > 0 and now_us - resend <= floor_us + TRANSIT then
  return answer('unknown')
end

-- Dead stays dead (G7): who was open when it ended cannot bring it back.
if ended then
  return answer((#ended == 7 and opened < struct.unpack('>I7', ended)) and 'gone' or 'missing')
end
if create == (identity and true or false) then
  return answer('missing')
end

if not create and digest ~= '' and digest ~= current_digest then
  -- Equality of SHA-256 values tells nothing about secrets by its time.
  local code, before = 'missing', 0
  for at = 1, #formers - FORMER_BYTES + 1, FORMER_BYTES do
    local former, moment, grace_end, may_commit = struct.unpack(FORMER, formers, at)
    if former == digest and now < grace_end then
      code, before = 'stale', opened < moment and 1 or 0
      -- A request that itself rotates gets a session of its own instead (G8).
      if before == 1 and may_commit == 1 and new_digest == '' then
        code = 'current'
      end
      break
    end
  end
  if code == 'stale' then return answer(code, before) end
  if code == 'missing' then return answer(code) end
end

-- What others changed since the base, by the journal. A base that is not in it as a pair means that
-- everything may have changed; one that is numbered above its floor is of a future lost in a failover.
local base_known, base_lost, everything, changed = true, false, false, {}
if base_version and not create and (base_version ~= version or base_id ~= last_id) then
  local prefix = base_id:sub(1, 4)
  local number, floor_id = struct.unpack('>I4c4', journal)
  base_known = base_version == number and prefix == floor_id
  base_lost = base_version >= number
  -- A base from before the floor is not to be found; from the floor on, all entries are walked.
  local at = base_version < number and #journal + 1 or 9
  while at <= #journal do
    local id, count
    id, count, at = struct.unpack('>c4B', journal, at)
    number = number + 1
    local foreign = number > base_version and not own:find(id, 1, true)
    if count == EVERYTHING then
      everything = everything or foreign
    else
      for _ = 1, count do
        local name
        name, at = struct.unpack('>Bc0', journal, at)
        if foreign then changed[name] = true end
      end
    end
    if number == base_version and id == prefix then base_known = true end
  end
  base_lost = base_lost and not base_known
end

-- A clear ends what was open or read before it; a delta that itself clears needs nothing of it.
if cleared and not clear then
  local clear_version, clear_moment = struct.unpack('>I4I7', cleared)
  if base_version then
    if base_version < clear_version or base_lost then return answer('gone') end
  elseif opened < clear_moment then
    return answer('gone')
  end
end

local sets, deletes, touched_names = {}, {}, {}
local fields_before = fields
local after = clear and 0 or bytes
if clear then fields = 0 end
local function take_out(name)
  local length = clear and 0 or redis.call('HSTRLEN', session, name)
  if length > 0 then after, fields = after - length - #name, fields - 1 end
end
local ttls = false
local at = 1
while at <= #packed_sets do
  local check, ttl, name, value
  check, ttl, name, value, at = struct.unpack('>BI6I4c0I4c0', packed_sets, at)
  sets[#sets + 1] = {name, value, check, ttl}
  touched_names[name] = true
  ttls = ttls or ttl > 0
  take_out(name)
  after, fields = after + #name + #value, fields + 1
end
at = 1
while at <= #packed_deletes do
  local check, name
  check, name, at = struct.unpack('>BI4c0', packed_deletes, at)
  deletes[#deletes + 1] = {name, false, check}
  touched_names[name] = true
  take_out(name)
end

-- Fields with an end of their own: keep the list, and take out what has expired.
local kept_deadlines, expired = {}, {}
if clear then deadlines = false end
if deadlines or ttls then
  at = 1
  while deadlines and at <= #deadlines do
    local name, deadline
    name, deadline, at = struct.unpack('>I4c0I6', deadlines, at)
    expired[name] = deadline <= now
    if not touched_names[name] then
      if deadline > now then
        kept_deadlines[#kept_deadlines + 1] = struct.pack('>I4c0I6', #name, name, deadline)
      else
        deletes[#deletes + 1] = {name, false, 0}
        take_out(name)
      end
    end
  end
  for _, set in ipairs(sets) do
    if set[4] > 0 then
      kept_deadlines[#kept_deadlines + 1] = struct.pack('>I4c0I6', #set[1], set[1], now + set[4])
    end
  end
end

if after > max_bytes and after > bytes then
  return answer('large', after)
end

-- Conflicts: strict ones stop the commit, the others are told with what they replaced.
local conflict, report = {}, {}
if not base_known or everything or next(changed) then
  local function look(entry)
    local name = entry[1]
    if entry[3] > 0 and (not base_known or everything or changed[name]) then
      local list = entry[3] == 2 and conflict or report
      list[#list + 1] = name
      list[#list + 1] = not expired[name] and redis.call('HGET', session, name)
    end
  end
  for _, set in ipairs(sets) do look(set) end
  for _, delete in ipairs(deletes) do look(delete) end
  if packed_reads == '*' then
    conflict[#conflict + 1] = '*'
    conflict[#conflict + 1] = false
  else
    at = 1
    while at <= #packed_reads do
      local name
      name, at = struct.unpack('>I4c0', packed_reads, at)
      look({name, false, 2})
    end
  end
  if #conflict > 0 then
    for _, item in ipairs(report) do conflict[#conflict + 1] = item end
    return answer_with(conflict, 'conflict', identity, state)
  end
end

-- From here on everything is decided; what follows only writes.

local replaced_version, replaced_id = version, last_id
version = version + 1
if create then
  current_digest, created = digest, now
  absolute_end = absolute > 0 and now + absolute or 0
end

local metas = {}
local function put(field, value)
  metas[#metas + 1] = field
  metas[#metas + 1] = value
end

local removed = {}
local principal_before, lifetime_before, permanent_before = principal, own_lifetime, permanent
if clear or new_principal ~= '' or new_label ~= '' or new_lifetime ~= '' then
  local function change(field, old, new)
    if clear then old = false end
    local value = old
    if new:sub(1, 1) == '=' then value = new:sub(2) elseif new == '-' then value = false end
    if value and (clear or value ~= old) then put(field, value) end
    if old and not value then removed[#removed + 1] = field end
    return value
  end
  principal = change('@p', principal, new_principal)
  label = change('@l', label, new_label)
  own_lifetime = change('@e', own_lifetime,
    new_lifetime == '' and '' or new_lifetime == '0' and '-' or '=' .. new_lifetime)
end
if new_permanent ~= '' then permanent = tonumber(new_permanent) end
local expiry_changed = create or permanent ~= permanent_before or own_lifetime ~= lifetime_before

if deadlines or ttls then
  local list = table.concat(kept_deadlines)
  if list ~= '' then put('@x', list) elseif deadlines then removed[#removed + 1] = '@x' end
end

-- Rotation replaces the digest inside the hash; the old one goes to the former ones (G8).
if new_digest ~= '' and not create then
  local kept = {}
  local open = in_flight and principal == principal_before
  kept[1] = struct.pack(FORMER, current_digest, now_us, now + grace, open and 1 or 0)
  for place = 1, #formers - FORMER_BYTES + 1, FORMER_BYTES do
    local former, moment, grace_end, may_commit = struct.unpack(FORMER, formers, place)
    if now < grace_end and #kept < 4 then
      kept[#kept + 1] = struct.pack(FORMER, former, moment, grace_end, open and may_commit or 0)
    end
  end
  formers = table.concat(kept)
  put('@f', formers)
  current_digest = new_digest
elseif clear and formers ~= '' then
  put('@f', formers)
end
if create or clear or new_digest ~= '' then
  identity = struct.pack(IDENTITY, FORMAT, current_digest, created, absolute_end)
  put('@i', identity)
end
if clear and not create then put('@c', struct.pack('>I4I7', version, now_us)) end

-- Ring and journal drop their older half when they are full, and keep the floor of what is left. A quiet
-- session keeps them short, so that it stays in the compact encoding (values up to 64 bytes).
local limit = (now_us - committed < 5000000 or after > 2048) and BUSY or QUIET
if create then ring = struct.pack(RING, 0, 0, 0) end
local ring_limit = limit == QUIET and QUIET or 2 * BUSY
if #ring + 8 > ring_limit then
  local _, halved, before = struct.unpack(RING, ring)
  local keep = math.floor((ring_limit - RING_HEAD) / 16)
  local dropped = (#ring - RING_HEAD) / 8 - keep
  -- The ids that were there at the last halving are from before it; of others only the last commit bounds it.
  local floor = dropped <= before and halved or committed
  ring = struct.pack(RING, floor, committed, keep) .. ring:sub(-8 * keep)
end
ring = ring .. write_id
put('@r', ring)

if create then
  put('@j', struct.pack('>I4c4', version, write_id))
else
  local names, length, most_names = {}, 0, limit / 2 + 16
  local count = #sets + #deletes
  for _, list in ipairs({sets, deletes}) do
    for _, entry in ipairs(list) do
      length = length + 1 + #entry[1]
      if length > most_names or #entry[1] > 250 then break end
      names[#names + 1] = struct.pack('>Bc0', #entry[1], entry[1])
    end
  end
  local entry
  if clear or #names < count or count >= EVERYTHING or length > most_names then
    entry = struct.pack('>c4B', write_id, EVERYTHING)
  else
    entry = struct.pack('>c4B', write_id, count) .. table.concat(names)
  end
  if #journal + #entry > limit then
    local number, id = struct.unpack('>I4c4', journal)
    local from, most = 9, limit == QUIET and limit or limit / 2
    while from <= #journal and 8 + #journal - from + 1 + #entry > most do
      local named
      id, named, from = struct.unpack('>c4B', journal, from)
      for _ = 1, named == EVERYTHING and 0 or named do
        from = from + 1 + journal:byte(from)
      end
      number = number + 1
    end
    journal = struct.pack('>I4c4', number, id) .. journal:sub(from)
  end
  put('@j', journal .. entry)
end

-- Emptied key by key it lives on for the grace time: a parallel request may be adding a key (G1).
local lifetime = own_lifetime and tonumber(own_lifetime) or default_lifetime
if own_lifetime and by_default then touch_interval = math.min(touch_interval, math.floor(lifetime / 20)) end
local emptied = fields == 0 and not principal and not create
if emptied then lifetime = math.min(lifetime, grace) end
local due = expiry_changed or clear or emptied or fields_before == 0 or now - touched >= touch_interval
if due then
  touched, ends = now, now + lifetime
  if absolute_end > 0 and absolute_end < ends then ends = absolute_end end
end
local any_rare = formers ~= '' or cleared or clear or own_lifetime or principal or label
  or #kept_deadlines > 0
local new_state = struct.pack(STATE, version, write_id, now_us, touched, ends, after, permanent,
  any_rare and 1 or 0, fields)

local CHUNK = 7000
local writes = {'@v', new_state}
for _, item in ipairs(metas) do writes[#writes + 1] = item end
for _, set in ipairs(sets) do
  writes[#writes + 1] = set[1]
  writes[#writes + 1] = set[2]
end
if clear and not create then
  -- The out-of-memory check looks at a script's first write alone: an HSET, not the DEL.
  redis.call('HSET', session, '@v', state)
  redis.call('DEL', session)
end
for first = 1, #writes, CHUNK do
  redis.call('HSET', session, unpack(writes, first, math.min(first + CHUNK - 1, #writes)))
end
if not clear then
  for _, delete in ipairs(deletes) do removed[#removed + 1] = delete[1] end
  for first = 1, #removed, CHUNK do
    redis.call('HDEL', session, unpack(removed, first, math.min(first + CHUNK - 1, #removed)))
  end
end
if due then redis.call('PEXPIRE', session, ends - now) end

local replaced = struct.pack('>I4c8', replaced_version, replaced_id)
return answer_with(report, 'applied',
  struct.pack(APPLIED, version, replaced, due and 1 or 0, expiry_changed and 1 or 0) .. identity .. new_state)
