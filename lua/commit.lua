-- commit.lua: apply one delta to one session, whole or not at all; also creates and rotates.
--
-- KEYS[1]   the session key, a hash: what an app has set under its own names, a leading '@' doubled, and
--             @i  format, digest of the secret, creation, absolute end
--             @v  version and write id, moment of that commit, last touch, end, bytes, permanence, whether
--                 there is any of the rare ones, number of fields
--             @r  ring: write ids of the last commits; from the second commit on
--             @j  journal: which fields the last commits changed; from the second commit on
--             @f  former digests, each with its moment and the end of its grace    (from here on: rare)
--             @n  digest that is offered and has not been presented yet
--             @c  version and moment of the last clear
--             @e, @p, @l  idle lifetime of its own, principal, label
--             @x  fields with an end of their own, and when that is
--             @t  alone: tombstone, the moment when the session ended
--
-- ARGV[1]   write id of this commit, 8 bytes; the reply echoes it
-- ARGV[2]   digest of the secret, 32 bytes; empty: whatever is current
-- ARGV[3]   numbers, packed: age of the request in microseconds; microseconds since the first sending of
--           this commit (0: this is the first); flags (1 create the session, 2 clear it before the fields
--           are set, 4 requests open at a rotation may still commit, 8 the touch interval is the default,
--           which goes by a lifetime of its own, 16 replicas are waited for); idle lifetime in ms, where the
--           session has none of its own; touch interval in ms; absolute lifetime of a new session in ms
--           (0: none); grace time for former digests and empty sessions in ms; most bytes of the session,
--           names and values
-- ARGV[4]   fields set, packed: check (0 none, 1 report, 2 strict), ttl in ms (0 none; 2^48 - 1: the end
--           that the field has now; 2^47 plus an end: the same, or this end where the field is gone), name,
--           value
-- ARGV[5]   base, packed: version and write id; empty: a blind write
-- ARGV[6]   own commits of this request since the base, 4 bytes of each write id
-- ARGV[7]   fields deleted, packed: check, name
-- ARGV[8]   fields that must not have changed either, packed names; '*': all of them
-- ARGV[9]   new digest, 32 bytes: rotate; empty: keep the secret
-- ARGV[10]  permanence: 0, 1, or empty for no change
-- ARGV[11]  idle lifetime of its own, ms; 0: none any more; empty: no change
-- ARGV[12]  principal: '=' and the text, '-' for none any more, empty for no change
-- ARGV[13]  label, in the same form
-- ARGV[14]  offer, packed: digest of another secret, and the age in ms at which the current one is due to
--           be renewed; empty: no renewal
--
-- From ARGV[4] on, what is empty up to the end may be left out.
--
-- Reply: {code, write id, time in microseconds, ...}, by code
--   applied   version, @v that was replaced (of an earlier sending only its pair, the first 12 bytes; 12
--             zeros: nothing, or no longer known), @i, @v, flags (1 the TTL was refreshed, 2 the offer was
--             taken, 4 the expiry changed, 8 an earlier sending was applied, so that none of this is
--             known); then name and replaced value (false: missing) of each field to report
--   conflict  @i, @v, then name and current value (false: missing) of each checked field that changed
--   gone      the session ended, or was cleared, after this request opened or its base was read
--   missing   there is no such session
--   stale     1 if the request was open before the rotation that made its digest a former one, else 0
--   large     bytes that the session would have had
--   unknown   sent again, and the ring no longer reaches back to the first sending
--   corrupt   what is stored is not of format 1

local session = KEYS[1]
local pack, parse = struct.pack, struct.unpack
local write_id = ARGV[1]
local digest = ARGV[2]
local age, resend, flags, default_lifetime, touch_interval, absolute, grace, max_bytes =
  parse('>I7I7BI6I6I6I6I4', ARGV[3])
local packed_sets = ARGV[4] or ''
local base = ARGV[5] or ''
local own = ARGV[6] or ''
-- All else changes rarely.
local packed_deletes, packed_reads, new_digest, offer = '', '', '', ''
local new_permanent, new_lifetime, new_principal, new_label = '', '', '', ''
if ARGV[7] then
  packed_deletes = ARGV[7]
  packed_reads = ARGV[8] or ''
  new_digest = ARGV[9] or ''
  new_permanent = ARGV[10] or ''
  new_lifetime = ARGV[11] or ''
  new_principal = ARGV[12] or ''
  new_label = ARGV[13] or ''
  offer = ARGV[14] or ''
end

local create, clear, in_flight = flags % 2 == 1, flags % 4 >= 2, flags % 8 >= 4
local by_default, waited_for = flags % 16 >= 8, flags >= 16
local base_version, base_id
if base ~= '' then base_version, base_id = parse('>I4c8', base) end

local FORMAT = 1
local IDENTITY, IDENTITY_BYTES = '>Bc32I6I6', 45 -- format, digest, created ms, absolute deadline ms
local STATE, STATE_BYTES = '>I4c8I7I6I6I4BBI4', 41 -- version, write id, committed us, touched ms, ends ms,
                                                 -- bytes, permanent, any rare metadata, fields
local FORMER, FORMER_BYTES = '>c32I7I6B', 46     -- digest, moment us, grace end ms, what it may
local NOTHING, COMMIT, ALL = 0, 1, 2             -- under a former digest: nothing goes any more, who was open
                                                 -- before may commit, all goes until the grace ends
local PENDING, PENDING_BYTES = '>c32I6', 38      -- digest offered and not yet presented, moment ms
local NONE = '\0\0\0\0\0\0\0\0'
local RING, RING_HEAD = '>I7I7B', 15                -- floor us, mark us, ids from before the mark
local TRANSIT = 20000                            -- microseconds by which two calls' transits may differ
local KEEP = 2 ^ 48 - 1                          -- a ttl: the end that the field has now
local KEPT = 2 ^ 47                              -- plus an end: the same, or this one if the field is gone
local EVERYTHING = 255                           -- a journal entry that names no fields
local RECENT = 5000000                           -- microseconds that a quiet session's last commit lies back
local QUIET, BUSY, CROWDED = 64, 256, 768        -- bytes of the journal
local RING_BUSY, RING_MOST = 512, 1024           -- bytes of the ring, QUIET of a quiet session's
local FEW = 8                                    -- commits that may lie between base and commit in no crowd
local NEVER = 2 ^ 47                             -- a touch interval: this is no use of the session
local TOUCH = 60000                              -- ms, the default touch interval at most
local CHUNK = 7000                               -- arguments that unpack takes

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = (now_us - now_us % 1000) / 1000
local opened = now_us - age

-- What is used rarely is read only if the state says that there is any of it.
local meta = redis.call('HMGET', session, '@i', '@v', '@r', '@j')
local identity, state, ring, journal = meta[1], meta[2], meta[3], meta[4]
local formers, cleared, own_lifetime, principal, label, deadlines = '', false, false, false, false, false
local pending = false

local version, last_id, committed, touched, ends, bytes, permanent, fields = 0, NONE, 0, 0, 0, 0, 0, 0
if identity then
  if #identity ~= IDENTITY_BYTES or identity:byte() ~= FORMAT or not state or #state ~= STATE_BYTES then
    return {'corrupt', write_id, now_us}
  end
  local rare
  version, last_id, committed, touched, ends, bytes, permanent, rare, fields = parse(STATE, state)
  -- Many sessions see one commit only. Until the second they keep no ring and no journal: @v has both.
  if version == 1 then
    ring = ring or pack(RING, 0, committed, 0) .. last_id
    journal = journal or state:sub(1, 8)
  end
  if not ring or #ring < RING_HEAD or not journal or #journal < 8 then
    return {'corrupt', write_id, now_us}
  end
  if rare == 1 then
    local more = redis.call('HMGET', session, '@f', '@c', '@e', '@p', '@l', '@x', '@n')
    formers, cleared, own_lifetime = more[1] or '', more[2], more[3]
    principal, label, deadlines, pending = more[4], more[5], more[6], more[7]
    -- With a lifetime below zero the TTL would end what is to be kept.
    if own_lifetime and (not own_lifetime:find('^[1-9]%d*$') or #own_lifetime > 14)
        or pending and #pending ~= PENDING_BYTES then
      return {'corrupt', write_id, now_us}
    end
  end
end

-- Sent again: a commit that has been applied is answered, never applied a second time. First sendings
-- are looked up too, since a hung server may run a closed connection's sending after the one that followed.
local found = identity and ring:find(write_id, 16, true)
if found then
  local behind = math.floor((#ring - found + 1) / 8) - 1
  local before = found > 23 and pack('>I4c8', version - behind - 1, ring:sub(found - 8, found - 1))
    or ('\0'):rep(12)
  -- WAIT counts replicas that have the last write of its own connection, so there has to be one.
  if waited_for then redis.call('HSET', session, '@v', state) end
  return {'applied', write_id, now_us, version - behind, before, identity, state, 8}
end
-- Not in the ring, but it may have been there: from before the floor nobody can tell any more. When it was
-- first sent is known here to a call's transit only, so in doubt it is unknown, never applied again.
if resend > 0 and identity then
  local floor_us = parse('>I7', ring)
  if floor_us > 0 and now_us - resend <= floor_us + TRANSIT then return {'unknown', write_id, now_us} end
end

-- Dead stays dead (G7): who was open when it ended cannot bring it back.
if not identity then
  local ended = redis.call('HGET', session, '@t')
  if ended then
    return {(#ended == 7 and opened < parse('>I7', ended)) and 'gone' or 'missing', write_id, now_us}
  end
end
if create == (identity and true or false) then
  return {'missing', write_id, now_us}
end

local current_digest = create and digest or identity:sub(2, 33)
local is_current = digest == current_digest
-- Equality of SHA-256 values tells nothing about secrets by its time.
local promoted = pending and digest == pending:sub(1, 32)
if digest ~= '' and not is_current and not promoted then
  local code, before, oldest = 'missing', 0, 0
  for at = 1, #formers - FORMER_BYTES + 1, FORMER_BYTES do
    local former, moment, grace_end, may = parse(FORMER, formers, at)
    if former == digest and now < grace_end then
      code, before = 'stale', opened < moment and 1 or 0
      -- A request that itself rotates gets a session of its own instead (G8).
      if may == ALL or before == 1 and may == COMMIT and new_digest == '' then
        code = 'current'
      end
      break
    end
    oldest = moment
  end
  -- Of former digests four are kept, for a while. Who was open before the oldest rotation that is still known
  -- may come with one from before it, and is not told that there is no session: he would begin one (G8).
  if code == 'missing' and opened < oldest then code, before = 'stale', 1 end
  -- What was read before a clear goes on nowhere, not in a session of its own either (G7).
  if code == 'stale' and base_version and cleared and not clear and base_version < parse('>I4', cleared) then
    code = 'gone'
  end
  if code == 'stale' then return {code, write_id, now_us, before} end
  if code == 'gone' then return {code, write_id, now_us} end
  if code == 'missing' then return {code, write_id, now_us} end
end

-- What others changed since the base, by the journal. A base that is not in it as a pair means that
-- everything may have changed; one that is numbered above its floor is of a future lost in a failover.
local base_known, base_lost, everything, changed = true, false, false, nil
if base_version and not create and (base_version ~= version or base_id ~= last_id) then
  local prefix = base_id:sub(1, 4)
  local number, floor_id = parse('>I4c4', journal)
  changed = {}
  base_known = base_version == number and prefix == floor_id
  base_lost = base_version >= number
  -- A base from before the floor is not to be found; from the floor on, all entries are walked.
  local at = base_version < number and #journal + 1 or 9
  while at <= #journal do
    local id, count
    id, count, at = parse('>c4B', journal, at)
    number = number + 1
    local foreign = number > base_version and not own:find(id, 1, true)
    if count == EVERYTHING then
      everything = everything or foreign
    else
      for _ = 1, count do
        local name
        name, at = parse('>Bc0', journal, at)
        if foreign then changed[name] = true end
      end
    end
    if number == base_version and id == prefix then base_known = true end
  end
  base_lost = base_lost and not base_known
end

-- A clear ends what was open or read before it; a delta that itself clears needs nothing of it.
if cleared and not clear then
  local clear_version, clear_moment = parse('>I4I7', cleared)
  if base_version then
    if base_version < clear_version or base_lost then return {'gone', write_id, now_us} end
  elseif opened < clear_moment then
    return {'gone', write_id, now_us}
  end
end

-- Names and values to set; names to delete; the checks and ttls that are not 0; what it all comes to.
local writes, removed, checks, ttls = {}, {}, nil, nil
local last_set = 0
local after, fields_before = bytes, fields
if clear then after, fields = 0, 0 end
local has_old = not clear and not create

local at, check, ttl, name, value = 1
if clear then deadlines = false end
local due_at = deadlines and {}
while deadlines and at <= #deadlines do
  local deadline
  name, deadline, at = parse('>I4c0I6', deadlines, at)
  due_at[name] = deadline
end
at = 1
while at <= #packed_sets do
  check, ttl, name, value, at = parse('>BI6I4c0I4c0', packed_sets, at)
  if check > 0 then
    checks = checks or {}
    checks[name] = check
  end
  local length = has_old and redis.call('HSTRLEN', session, name) or 0
  local lapsed = false
  if ttl >= KEPT then
    local due_then = due_at and due_at[name]
    if not due_then and ttl < KEEP and length == 0 then due_then = ttl - KEPT end
    ttl = due_then and due_then - now or 0
    lapsed = due_then and due_then <= now
  end
  if lapsed then
    removed[#removed + 1] = name
  else
    if ttl > 0 then
      ttls = ttls or {}
      ttls[name] = ttl
    end
    if last_set == 0 then
      writes = {name, value} -- mostly the only one, and a table that grows costs more
    else
      writes[last_set + 1], writes[last_set + 2] = name, value
    end
    last_set = last_set + 2
    after, fields = after + #name + #value, fields + 1
    if length > 0 then after, fields = after - #name - length, fields - 1 end
  end
end
at = 1
while at <= #packed_deletes do
  check, name, at = parse('>BI4c0', packed_deletes, at)
  removed[#removed + 1] = name
  if check > 0 then
    checks = checks or {}
    checks[name] = check
  end
end

-- Fields with an end of their own: keep the list, and take out what has expired.
local kept_deadlines, expired
if deadlines or ttls then
  kept_deadlines, expired = {}, {}
  local mine = {}
  for i = 1, last_set, 2 do mine[writes[i]] = true end
  for i = 1, #removed do mine[removed[i]] = true end
  at = 1
  while deadlines and at <= #deadlines do
    local deadline
    name, deadline, at = parse('>I4c0I6', deadlines, at)
    expired[name] = deadline <= now
    if not mine[name] then
      if deadline > now then
        kept_deadlines[#kept_deadlines + 1] = pack('>I4c0I6', #name, name, deadline)
      else
        removed[#removed + 1] = name
      end
    end
  end
  for set, milliseconds in pairs(ttls or {}) do
    kept_deadlines[#kept_deadlines + 1] = pack('>I4c0I6', #set, set, now + milliseconds)
  end
end
-- Of these the journal tells; what is set and deleted from here on is metadata.
local fields_set, fields_changed = last_set / 2, last_set / 2 + #removed

for i = 1, has_old and #removed or 0 do
  local length = redis.call('HSTRLEN', session, removed[i])
  if length > 0 then after, fields = after - length - #removed[i], fields - 1 end
end

if after > max_bytes and after > bytes then
  return {'large', write_id, now_us, after}
end
if #new_principal + #new_label > max_bytes then
  return {'large', write_id, now_us, after + #new_principal + #new_label}
end

-- Conflicts: strict ones stop the commit, the others are told with what they replaced.
local report
if changed and (not base_known or everything or next(changed)) then
  local conflict = {}
  report = {}
  local function look(field, how)
    if how and (not base_known or everything or changed[field]) then
      local list = how == 2 and conflict or report
      list[#list + 1] = field
      list[#list + 1] = not (expired and expired[field]) and redis.call('HGET', session, field)
    end
  end
  if checks then
    for i = 1, last_set, 2 do look(writes[i], checks[writes[i]]) end
    for i = 1, #removed do look(removed[i], checks[removed[i]]) end
  end
  if packed_reads == '*' then
    conflict[#conflict + 1] = '*'
    conflict[#conflict + 1] = false
  else
    at = 1
    while at <= #packed_reads do
      name, at = parse('>I4c0', packed_reads, at)
      look(name, 2)
    end
  end
  if #conflict > 0 then
    local reply = {'conflict', write_id, now_us, identity, state}
    for _, list in ipairs({conflict, report}) do
      for _, item in ipairs(list) do reply[#reply + 1] = item end
    end
    return reply
  end
end

-- From here on everything is decided; what follows only writes.

version = version + 1

local principal_before, lifetime_before, permanent_before = principal, own_lifetime, permanent
if clear or new_principal ~= '' or new_label ~= '' or new_lifetime ~= '' then
  local function change(field, old, new)
    if clear then old = false end
    local now_set = old
    if new:sub(1, 1) == '=' then now_set = new:sub(2) elseif new == '-' then now_set = false end
    if now_set and (clear or now_set ~= old) then
      writes[#writes + 1] = field
      writes[#writes + 1] = now_set
    end
    if old and not now_set then removed[#removed + 1] = field end
    return now_set
  end
  principal = change('@p', principal, new_principal)
  label = change('@l', label, new_label)
  own_lifetime = change('@e', own_lifetime,
    new_lifetime == '' and '' or new_lifetime == '0' and '-' or '=' .. new_lifetime)
end
if new_permanent ~= '' then permanent = tonumber(new_permanent) end
local expiry_changed = create or permanent ~= permanent_before or own_lifetime ~= lifetime_before

if kept_deadlines then
  if #kept_deadlines > 0 then
    writes[#writes + 1] = '@x'
    writes[#writes + 1] = table.concat(kept_deadlines)
  elseif deadlines then
    removed[#removed + 1] = '@x'
  end
end

-- The digest is replaced inside the hash, by a rotation or by an offered secret that is presented for the
-- first time; the old one goes to the former ones (G8).
local had_pending = pending
local rotates = new_digest ~= '' and not create
if promoted or rotates then
  local function replace_digest(by, may, limit)
    local kept = {pack(FORMER, current_digest, now_us, now + grace, may)}
    -- An offered secret may be on its way to the browser, or there already: it ends as the current one does.
    local offered = pending and pending:sub(1, 32)
    if offered and offered ~= by then kept[2] = pack(FORMER, offered, now_us, now + grace, may) end
    for place = 1, #formers - FORMER_BYTES + 1, FORMER_BYTES do
      local former, moment, grace_end, may_still = parse(FORMER, formers, place)
      if now < grace_end and #kept < 4 then
        -- What a renewal had left in force ends with a rotation, too.
        if may_still == ALL and limit < ALL then moment, grace_end = now_us, now + grace end
        kept[#kept + 1] = pack(FORMER, former, moment, grace_end, math.min(may_still, limit))
      end
    end
    formers, current_digest, pending = table.concat(kept), by, false
  end
  if promoted then replace_digest(digest, ALL, ALL) end
  if rotates then
    local may = in_flight and principal == principal_before and COMMIT or NOTHING
    replace_digest(new_digest, may, may)
  end
end
-- A secret that is due is renewed in two phases, since an answer may be lost: this one is offered, and
-- takes over when it is first presented. One that nobody presents is replaced after the grace.
local taken = 0
if offer ~= '' and is_current and new_digest == '' and not create then
  local next_digest, renew_after = parse(PENDING, offer)
  local _, _, since = parse(IDENTITY, identity)
  if formers ~= '' then since = math.floor(select(2, parse(FORMER, formers)) / 1000) end
  local offered = pending and select(2, parse(PENDING, pending)) or 0
  if now - since >= renew_after and now - offered >= grace then
    pending, taken = pack(PENDING, next_digest, now), 2
  end
end
if pending and (clear or taken > 0) then
  writes[#writes + 1] = '@n'
  writes[#writes + 1] = pending
elseif had_pending and not pending then
  removed[#removed + 1] = '@n'
end
if create or clear or new_digest ~= '' or promoted then
  local _, created, absolute_end = nil, now, absolute > 0 and now + absolute or 0
  if not create then _, _, created, absolute_end = parse(IDENTITY, identity) end
  identity = pack(IDENTITY, FORMAT, current_digest, created, absolute_end)
  writes[#writes + 1] = '@i'
  writes[#writes + 1] = identity
  if formers ~= '' then
    writes[#writes + 1] = '@f'
    writes[#writes + 1] = formers
  end
  if clear and not create then
    writes[#writes + 1] = '@c'
    writes[#writes + 1] = pack('>I4I7', version, now_us)
  end
end

-- A quiet session keeps ring and journal short, so that it stays in the compact encoding (values up to 64
-- bytes); where many commit at once the journal reaches back further, as their bases do.
if not create then
  local quiet = now_us - committed >= RECENT and after <= 2048
  local lagging = base_version and version - 1 - base_version > FEW
  local limit = quiet and QUIET or (lagging or #journal > BUSY) and CROWDED or BUSY

  -- The ring lets go of what is no longer recent: what was there at the mark, once that is long enough ago,
  -- or there is no more room. When those came the mark bounds, so that it is the floor of what is left.
  if #ring + 8 > (quiet and QUIET or RING_BUSY) then
    local floor, mark, before = parse(RING, ring)
    local ids, dropped = (#ring - RING_HEAD) / 8, nil
    if quiet then
      dropped = math.max(ids - 3, 0)
      floor = committed
    elseif before == 0 or now_us - mark >= RECENT or #ring + 8 > RING_MOST then
      dropped = before
      if before > 0 then floor = mark end
    end
    if dropped then
      ring = pack(RING, floor, committed, ids - dropped) .. ring:sub(RING_HEAD + 1 + 8 * dropped)
    end
  end
  ring = ring .. write_id

  local entry
  if not clear and fields_changed < EVERYTHING then
    entry = pack('>c4B', write_id, fields_changed)
    for i = 1, fields_changed do
      local changed_name = i <= fields_set and writes[2 * i - 1] or removed[i - fields_set]
      local size = #changed_name
      if size > 255 or #entry + size > limit / 2 + 20 then
        entry = nil
        break
      end
      entry = entry .. pack('>Bc0', size, changed_name)
    end
  end
  entry = entry or pack('>c4B', write_id, EVERYTHING)
  if #journal + #entry > limit then
    local number, id = parse('>I4c4', journal)
    local most = limit == QUIET and limit or lagging and CROWDED / 2 or BUSY / 2
    local from = 9
    while from <= #journal and 8 + #journal - from + 1 + #entry > most do
      local count
      id, count, from = parse('>c4B', journal, from)
      for _ = 1, count == EVERYTHING and 0 or count do
        from = from + 1 + journal:byte(from)
      end
      number = number + 1
    end
    journal = pack('>I4c4', number, id) .. journal:sub(from)
  end
  journal = journal .. entry
end

-- Emptied key by key it lives on for the grace time: a parallel request may be adding a key (G1).
local lifetime = own_lifetime and tonumber(own_lifetime) or default_lifetime
if own_lifetime and touch_interval < NEVER then
  touch_interval = by_default and math.min(TOUCH, math.floor(lifetime / 20))
    or math.min(touch_interval, math.floor(lifetime / 2))
end
local emptied = fields == 0 and not principal and not create
if emptied then lifetime = math.min(lifetime, grace) end
local due = expiry_changed or clear or emptied or fields_before == 0 or now - touched >= touch_interval
if due then
  local _, _, _, absolute_end = parse(IDENTITY, identity)
  touched, ends = now, now + lifetime
  if absolute_end > 0 and absolute_end < ends then ends = absolute_end end
end
local rare = formers ~= '' or cleared or clear or own_lifetime or principal or label or pending
  or kept_deadlines and #kept_deadlines > 0
local new_state = pack(STATE, version, write_id, now_us, touched, ends, after, permanent,
  rare and 1 or 0, fields)

if clear and not create then
  -- The out-of-memory check looks at a script's first write alone: an HSET, not the DEL.
  redis.call('HSET', session, '@v', state)
  redis.call('DEL', session)
end
if create then
  redis.call('HSET', session, '@v', new_state, unpack(writes, 1, math.min(#writes, CHUNK)))
else
  redis.call('HSET', session, '@v', new_state, '@r', ring, '@j', journal,
    unpack(writes, 1, math.min(#writes, CHUNK)))
end
for first = CHUNK + 1, #writes, CHUNK do
  redis.call('HSET', session, unpack(writes, first, math.min(first + CHUNK - 1, #writes)))
end
if not clear then
  for first = 1, #removed, CHUNK do
    redis.call('HDEL', session, unpack(removed, first, math.min(first + CHUNK - 1, #removed)))
  end
end
if due then redis.call('PEXPIRE', session, ends - now) end

-- Nobody is told of a refresh while a renewal is under way (it would bring the old id back to the browser),
-- nor of the short end of an emptied session: a parallel request may add a key, and needs the cookie.
local told = (due and not pending and not emptied and 1 or 0) + taken + (expiry_changed and 4 or 0)
local reply = {'applied', write_id, now_us,
  version, create and ('\0'):rep(12) or state, identity, new_state, told}
for i = 1, report and #report or 0 do reply[#reply + 1] = report[i] end
return reply
