-- load.lua: read one session, or only what changed since a version; refresh its TTL when due.
--
-- KEYS[1]  the session key, a hash
--
-- ARGV[1]  call id, 8 bytes; the reply echoes it
-- ARGV[2]  digest of the secret, 32 bytes; empty: whatever is current
-- ARGV[3]  numbers, packed: age of the request in microseconds; idle lifetime in ms, where the session has
--          none of its own; touch interval in ms; grace time for former digests and empty sessions in ms
-- ARGV[4]  base, packed: version and write id; empty: nothing is held, send all
-- ARGV[5]  offer, packed: digest of another secret, and the age in ms at which the current one is due to
--          be renewed; empty: no renewal
--
-- From ARGV[4] on, what is empty up to the end may be left out.
--
-- Reply: {code, call id, time in microseconds, ...}, by code
--   unchanged  @i, @v, under a former digest, flags (1 touched, 2 the offer was taken)
--   changed    @i, @v, under a former digest, flags, @e, @p, @l, @x, then name and value (false:
--              missing) of each field that changed since the base
--   full       @i, @v, under a former digest, flags, and a list of all names and values of the hash
--   missing    there is no such session
--   gone       the session ended after this request opened
--   stale      1 if the request was open before the rotation that made its digest a former one, else 0
--   corrupt    what is stored is not of format 1

local session = KEYS[1]
local pack, parse = struct.pack, struct.unpack
local call_id = ARGV[1]
local digest = ARGV[2]
local age, default_lifetime, touch_interval, grace = parse('>I7I6I6I6', ARGV[3])
local base = ARGV[4] or ''
local offer = ARGV[5] or ''

local FORMAT = 1
local IDENTITY_BYTES = 45 -- format, digest, created ms, absolute deadline ms
local PENDING, PENDING_BYTES = '>c32I6', 38
local COMMIT, ALL = 1, 2
local STATE, STATE_BYTES = '>I4c8I7I6I6I4BBI4', 41
local FORMER, FORMER_BYTES = '>c32I7I6B', 46
local EVERYTHING = 255

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = (now_us - now_us % 1000) / 1000
local opened = now_us - age

-- What is used rarely is read only if the state says that there is any of it.
local meta = redis.call('HMGET', session, '@i', '@v', '@t')
local identity, state, ended = meta[1], meta[2], meta[3]
local formers, own_lifetime, principal, label, deadlines, pending = '', false, false, false, false, false

if ended then
  return {(#ended == 7 and opened < parse('>I7', ended)) and 'gone' or 'missing', call_id, now_us}
end
if not identity then return {'missing', call_id, now_us} end
if #identity ~= IDENTITY_BYTES or identity:byte() ~= FORMAT or not state or #state ~= STATE_BYTES then
  return {'corrupt', call_id, now_us}
end
local current_digest, created_at = identity:sub(2, 33), 34
local version, last_id, committed, touched, _, bytes, permanent, rare, fields = parse(STATE, state)
if rare == 1 then
  local more = redis.call('HMGET', session, '@f', '@e', '@p', '@l', '@x', '@n')
  formers, own_lifetime, principal, label, deadlines = more[1] or '', more[2], more[3], more[4], more[5]
  pending = more[6]
  if own_lifetime and (not own_lifetime:find('^[1-9]%d*$') or #own_lifetime > 14)
      or pending and #pending ~= PENDING_BYTES then
    return {'corrupt', call_id, now_us}
  end
end

-- Equality of SHA-256 values tells nothing about secrets by its time.
local is_former, is_current = 0, digest == current_digest
if pending and digest == pending:sub(1, 32) then
  -- Offered, and now presented: it takes over. The old one stays in force for the grace, as requests of
  -- the same page may still carry it. A refused write (out of memory, a replica) never fails the read.
  local kept = pack(FORMER, current_digest, now_us, now + grace, ALL)
    .. formers:sub(1, 3 * FORMER_BYTES)
  local new_identity = identity:sub(1, 1) .. digest .. identity:sub(created_at)
  if type(redis.pcall('HSET', session, '@i', new_identity, '@f', kept)) == 'number' then
    redis.call('HDEL', session, '@n')
    identity, formers, pending = new_identity, kept, false
  end
elseif digest ~= '' and not is_current then
  local code, before, oldest = 'missing', 0, 0
  for at = 1, #formers - FORMER_BYTES + 1, FORMER_BYTES do
    local former, moment, grace_end, may = parse(FORMER, formers, at)
    if former == digest and now < grace_end then
      code, before = 'stale', opened < moment and 1 or 0
      is_former = (may == ALL or before == 1 and may == COMMIT) and 1 or 0
      break
    end
    oldest = moment
  end
  -- Of former digests four are kept, for a while: it may be one from before them, see commit.lua.
  if code == 'missing' and opened < oldest then code, before = 'stale', 1 end
  if code == 'missing' then return {code, call_id, now_us} end
  if is_former == 0 then return {code, call_id, now_us, before} end
end

-- The sliding TTL. A refused refresh (out of memory, a replica) never fails the read.
local flags = 0
if now - touched >= touch_interval then
  local lifetime = own_lifetime and tonumber(own_lifetime) or default_lifetime
  if not principal then
    if fields == 0 then lifetime = math.min(lifetime, grace) end
  end
  local new_ends = now + lifetime
  local _, absolute_end = parse('>I6I6', identity, created_at)
  if absolute_end > 0 and absolute_end < new_ends then new_ends = absolute_end end
  -- Over this very moment: a TTL below 1 would delete the key, and what is written after that stay for good.
  if new_ends <= now then return {'missing', call_id, now_us} end
  local new_state = pack(STATE, version, last_id, committed, now, new_ends, bytes, permanent,
    rare, fields)
  local reply = redis.pcall('HSET', session, '@v', new_state)
  if type(reply) == 'number' then
    redis.call('PEXPIRE', session, new_ends - now)
    state = new_state
    -- Nobody is told while a renewal is under way (it would bring the old id back to the browser), nor of
    -- the short end of an emptied session.
    if not pending and (fields > 0 or principal) then flags = 1 end
  end
end

-- A secret that is due is renewed in two phases, since an answer may be lost: see commit.lua.
if offer ~= '' and is_current then
  local next_digest, renew_after = parse(PENDING, offer)
  local since = parse('>I6', identity, created_at)
  if formers ~= '' then since = math.floor(select(2, parse(FORMER, formers)) / 1000) end
  local offered = pending and select(2, parse(PENDING, pending)) or 0
  if now - since >= renew_after and now - offered >= grace then
    local marked = state:sub(1, 36) .. '\1' .. state:sub(38)
    local reply = redis.pcall('HSET', session, '@n', pack(PENDING, next_digest, now), '@v', marked)
    if type(reply) == 'number' then
      state, flags = marked, 2
    end
  end
end

if base == state:sub(1, 12) then
  return {'unchanged', call_id, now_us, identity, state, is_former, flags}
end

-- What changed since the base, by the journal; nil if the base is not in it, as a pair.
local names
if base ~= '' then
  local journal = redis.call('HGET', session, '@j')
  -- A session of one commit has no journal yet: it follows from @v, see commit.lua.
  if version == 1 then journal = journal or state:sub(1, 8) end
  if not journal or #journal < 8 then return {'corrupt', call_id, now_us} end
  local base_version, prefix = parse('>I4c4', base)
  local number, floor_id = parse('>I4c4', journal)
  local known, everything = base_version == number and prefix == floor_id, false
  -- A base from before the floor is not to be found; from the floor on, all entries are walked.
  local at = base_version < number and #journal + 1 or 9
  names = {}
  while at <= #journal do
    local id, count
    id, count, at = parse('>c4B', journal, at)
    number = number + 1
    if count == EVERYTHING then
      everything = everything or number > base_version
    else
      for _ = 1, count do
        local name
        name, at = parse('>Bc0', journal, at)
        if number > base_version then names[name] = true end
      end
    end
    if number == base_version and id == prefix then known = true end
  end
  if everything or not known then names = nil end
end

if not names then
  return {'full', call_id, now_us, identity, state, is_former, flags, redis.call('HGETALL', session)}
end
local list = {}
for name in pairs(names) do list[#list + 1] = name end
local reply = {'changed', call_id, now_us, identity, state, is_former, flags,
  own_lifetime, principal, label, deadlines}
if #list > 0 then
  local values = redis.call('HMGET', session, unpack(list))
  for i, name in ipairs(list) do
    reply[#reply + 1] = name
    reply[#reply + 1] = values[i]
  end
end
return reply
