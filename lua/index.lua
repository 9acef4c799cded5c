-- index.lua: keep the index of one principal: enter a session, take others out, tell what is there.
--
-- KEYS[1]  the index, a sorted set: handles by the moment of their entry, microseconds
--
-- ARGV[1]  call id, 8 bytes; the reply echoes it
-- ARGV[2]  handle to enter, or to enter anew; empty: none
-- ARGV[3]  youth, ms: younger entries are not taken out
-- ARGV[4]  how long the index is needed at least, ms; 0: as long as it has entries
-- ARGV[5]  most entries to tell, the oldest first; -1: all
-- ARGV[6]  handles to take out, 22 characters each
--
-- Reply: {code, call id, time in microseconds, ...}, by code
--   entries  handle and moment of its entry, microseconds, of each

local index = KEYS[1]
local call_id = ARGV[1]
local entered = ARGV[2]
local youth_us = tonumber(ARGV[3]) * 1000
local needed = tonumber(ARGV[4])
local most = tonumber(ARGV[5])
local taken_out = ARGV[6]

local HANDLE = 22
local FOR_GOOD = 31536000000000 -- ms, 1000 years

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]

if entered ~= '' then
  local left = redis.call('PTTL', index)
  redis.call('ZADD', index, now_us, entered)
  -- Sessions without an absolute end come to those that have one: what was set for these is too short.
  if needed == 0 and left >= 0 then needed = FOR_GOOD end
  -- An index without a TTL (-1) may hold sessions that have no absolute end.
  if needed > 0 and left ~= -1 and left < needed then redis.call('PEXPIRE', index, needed) end
end

for at = 1, #taken_out, HANDLE do
  local handle = taken_out:sub(at, at + HANDLE - 1)
  local moment = redis.call('ZSCORE', index, handle)
  -- A log-in enters its session before the session says so: what is young may be about to.
  if moment and now_us - tonumber(moment) >= youth_us then redis.call('ZREM', index, handle) end
end

local reply = {'entries', call_id, now_us}
if most ~= 0 then
  for _, item in ipairs(redis.call('ZRANGE', index, 0, most < 0 and -1 or most - 1, 'WITHSCORES')) do
    reply[#reply + 1] = item
  end
end
return reply
